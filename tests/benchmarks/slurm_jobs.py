"""What a run through SLURM was, by what SLURM itself recorded, and what submission cost above the rules' own time.

    python tests/benchmarks/slurm_jobs.py [folder of the run] [beginning of the job names, default winnow]

A job's own time is that of its benchmark file. Start-up is the time that it held its node above that: two starts of Snakemake.
The wait is from submission to start. Fails if a rule that is not local made something without a job, or a job lacks its GPU.
"""

import csv
import statistics
import subprocess
import sys
from collections import defaultdict
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


def own_times(folder: Path) -> dict[tuple[str, str], float]:
    """{(rule, its wildcards as in the comment of a job): seconds}"""
    found = {}
    for path in sorted((folder / "results" / "benchmarks").rglob("*.tsv")):
        rule, *wildcards = path.relative_to(folder / "results" / "benchmarks").with_suffix("").parts
        with open(path, newline="", encoding="utf-8") as stream:
            found[rule, "_".join(wildcards)] = float(next(csv.DictReader(stream, delimiter="\t"))["s"])
    return found


def seconds(job: dict[str, str], begin: str, end: str) -> float:
    return (datetime.fromisoformat(job[end]) - datetime.fromisoformat(job[begin])).total_seconds()


def main(folder: Path, prefix: str) -> None:
    made, own = jobs(prefix), own_times(folder)
    heavy = {key: time for key, time in own.items() if key[0] not in LOCAL}
    done, rows = set(), defaultdict(list)
    for job in made:
        rule, _, wildcards = job["Comment"].removeprefix("rule_").partition("_wildcards_")
        done |= {(rule, wildcards)} if job["State"] == "COMPLETED" else set()
        rows[rule].append((job, heavy.get((rule, wildcards))))
    print("| rule | jobs | completed | with a GPU | own time, s | start-up, s | wait, s |\n|---|---:|---:|---:|---:|---:|---:|")
    for rule, found in sorted(rows.items()):
        finished = [(job, time) for job, time in found if job["State"] == "COMPLETED" and time is not None]
        gpus = sum("gres/gpu=1" in job["AllocTRES"] for job, _ in found)
        numbers = [
            statistics.mean(time for _, time in finished),
            statistics.mean(seconds(job, "Start", "End") - time for job, time in finished),
            statistics.median(seconds(job, "Submit", "Start") for job, _ in finished),
        ]
        print(f"| {rule} | {len(found)} | {len(finished)} | {gpus} | {' | '.join(f'{n:.1f}' for n in numbers)} |")
    held = sum(seconds(job, "Start", "End") for job in made)
    began, ended = min(job["Submit"] for job in made), max(job["End"] for job in made)
    whole = (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
    spent = sum(heavy.values())
    print(f"{len(made)} jobs on {', '.join(sorted({job['NodeList'] for job in made}))}; {whole:.0f} s from first to last")
    print(f"{held:.0f} s held, {spent:.0f} s of them the rules' own: {(held - spent) / len(made):.1f} s of start-up a job")
    print(f"made where the run was started: {', '.join(sorted({rule for rule, _ in own} & LOCAL))}")
    if missing := set(heavy) - done:
        sys.exit(f"made without a job: {sorted(missing)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), sys.argv[2] if len(sys.argv) > 2 else "winnow")
