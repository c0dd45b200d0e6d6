"""`snakemake --lint`, less one piece of advice: an environment per rule. All rules share the one that `make` installs."""

import re
import subprocess
import sys

ALLOWED = "Specify a conda environment or container for each rule."


def main() -> int:
    done = subprocess.run(["snakemake", "--lint"], capture_output=True, text=True)
    output = done.stdout + done.stderr
    found = re.findall(r"^Lints for (.+):$|^    \* (.+):$", output, flags=re.MULTILINE)
    if done.returncode and not found:  # it did not come as far as linting
        print(output)
        return 1
    where, bad = "", 0
    for place, title in found:
        where = place or where
        if title and title != ALLOWED:
            print(f"{where}: {title}")
            bad += 1
    print(f"snakemake --lint: {bad} to mend")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
