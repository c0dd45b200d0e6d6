"""Put the results of a finished `make demo` into the documentation: its table, its picture, and the block of README.md; and
after `snakemake studies` the verdicts on the claims of the papers.

python docs/update.py [results]
"""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)
COPIED = {"tables/summary.csv": "docs/results/demo.csv", "figures/frontier.png": "docs/images/frontier.png"}
FOUND = ("id", "study", "model", "value", "error", "verdict")


def block(results: Path) -> str:
    """What `winnow show results --markdown` prints."""
    command = [sys.executable, "-m", "winnow", "show", str(results), "--markdown"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def verdicts(results: Path) -> list[dict[str, str]]:
    """What the studies of a run found for every claim, in the order of the studies."""
    rows = []
    for path in sorted((results / "studies").glob("*/claims.csv")):
        with open(path, newline="", encoding="utf-8") as stream:
            rows += [{name: row[name] for name in FOUND} for row in csv.DictReader(stream)]
    return rows


def main(results: Path) -> None:
    """Copy what the run made, and rewrite the block."""
    if missing := [name for name in COPIED if not (results / name).is_file()]:
        sys.exit(f"{results / missing[0]}: no such file; run `make demo` first")
    for name, copy in COPIED.items():
        (ROOT / copy).parent.mkdir(exist_ok=True)
        shutil.copyfile(results / name, ROOT / copy)
    if rows := verdicts(results):
        with open(ROOT / "docs" / "results" / "claims.csv", "w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, FOUND, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    readme = ROOT / "README.md"
    text, found = BLOCK.subn(lambda _: block(results), readme.read_text(encoding="utf-8"))
    assert found == 1, "README.md has one block between <!-- results --> and <!-- end of results -->"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results"))
