"""What a run through SLURM was, by what SLURM itself recorded, and what submission cost above the rules' own time.

    python tests/benchmarks/slurm_jobs.py [folder of the run] [beginning of the job names, default winnow]

A job's own time is that of the benchmark files of what it made. Start-up is the time that it held its node above that: one start
of Snakemake, and one for each of its members where the profile groups them. The wait is the median from submission to start.
Fails if fewer jobs of a rule were completed than it has benchmark files: then some were made where the run was started.
"""

import csv
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

FIELDS = ["JobID", "JobName", "State", "Submit", "Start", "End", "AllocTRES", "NodeList", "Comment"]
LOCAL = {"cards", "tables", "figures", "report", "conclude_study", "studies"}
LOCAL |= {f"tabulate_{kind}" for kind in ("accuracy", "classification", "latency")}


def jobs(prefix: str) -> list[dict[str, str]]:
    """Finished jobs with such a name, as `sacct` has them."""
    command = ["sacct", "-X", "-n", "-P", "-S", "now-2days", "-o", ",".join(f"{field}%300" for field in FIELDS)]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [dict(zip(FIELDS, row.split("|", len(FIELDS) - 1), strict=True)) for row in rows]
    return [job for job in found if job["JobName"].startswith(prefix) and job["End"] != "Unknown"]


def members() -> Counter:
    """{id of a job: its completed steps}, each the start of one rule."""
    command = ["sacct", "-n", "-P", "-S", "now-2days", "-o", "JobID%60,State"]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    steps = [row.partition("|")[0].split(".") for row in rows if row.endswith("|COMPLETED") and "." in row]
    return Counter(job for job, step in steps if step.isdigit())


def own_times(folder: Path) -> dict[str, list[float]]:
    """{rule: seconds of each of its jobs}"""
    found: dict[str, list[float]] = defaultdict(list)
    for path in sorted((folder / "results" / "benchmarks").rglob("*.tsv")):
        with open(path, newline="", encoding="utf-8") as stream:
            rule = path.relative_to(folder / "results" / "benchmarks").with_suffix("").parts[0]
            found[rule].append(float(next(csv.DictReader(stream, delimiter="\t"))["s"]))
    return found


def rule_of(job: dict[str, str], rules: set[str]) -> str:
    """A job's comment is rule_<rule>_wildcards_..., that of several together rule_<group>_<rule>."""
    name = job["Comment"].removeprefix("rule_").partition("_wildcards")[0]
    return name if name in rules else name.partition("_")[2]


def held(job: dict[str, str]) -> float:
    return seconds(job, "Start", "End")


def seconds(job: dict[str, str], begin: str, end: str) -> float:
    return (datetime.fromisoformat(job[end]) - datetime.fromisoformat(job[begin])).total_seconds()


def main(folder: Path, prefix: str) -> None:
    made, own, steps = jobs(prefix), own_times(folder), members()
    print("| rule | submissions | jobs | with a GPU | own time, s | start-up, s | wait, s |\n|---|---:|---:|---:|---:|---:|---:|")
    missing, spent = [], 0.0
    for rule in sorted(set(own) - LOCAL):
        mine = [job for job in made if rule_of(job, set(own)) == rule]
        done = [job for job in mine if job["State"] == "COMPLETED"]
        count = sum(steps[job["JobID"]] for job in done)
        missing += [rule] if count < len(own[rule]) else []
        spent += sum(own[rule])
        start = (sum(held(job) for job in done) - sum(own[rule])) / max(1, count)
        wait = statistics.median([seconds(job, "Submit", "Start") for job in mine] or [0])
        gpus = sum("gres/gpu=1" in job["AllocTRES"] for job in mine)
        print(f"| {rule} | {len(mine)} | {count} | {gpus} | {statistics.mean(own[rule]):.1f} | {start:.1f} | {wait:.0f} |")
    whole = datetime.fromisoformat(max(job["End"] for job in made)) - datetime.fromisoformat(min(job["Submit"] for job in made))
    print(f"{len(made)} submissions on {', '.join(sorted({job['NodeList'] for job in made}))}; {whole} from first to last")
    total = sum(held(job) for job in made)
    print(
        f"{total:.0f} s held, {spent:.0f} s of them the rules' own: {(total - spent) / len(made):.1f} s of start-up a submission"
    )
    print(f"made where the run was started: {', '.join(sorted(set(own) & LOCAL))}")
    if missing:
        sys.exit(f"made without a job: {', '.join(missing)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), sys.argv[2] if len(sys.argv) > 2 else "winnow")
