"""Why jobs on a cluster were stopped from outside, a line each, from what SLURM wrote at the end of their logs.

Snakemake says that such a job failed, and where its logs are; the job itself could not say anything any more.
"""

from __future__ import annotations

import re
from pathlib import Path

# In this order: SLURM says of a job that it killed for its time or its memory that it was cancelled, too.
REASONS = {
    r"oom.?kill|cgroup out.of.memory|exceeded (job )?memory limit": "took more memory than it asked for; every retry asks for "
    "twice as much",
    r"DUE TO TIME LIMIT": "did not end within its time limit; every retry gets twice as long",
    r"DUE TO NODE FAILURE": "was lost with its node",
    r"DUE TO PREEMPTION": "had to give way to a job of others",
    r"\*\*\* JOB \d+ ON \S+ CANCELLED": "was cancelled",
}
TAIL = 1 << 16  # bytes; the reason is in the last lines
MOST = 20  # lines; a run that is ended cancels all its jobs


def stopped(logs: Path, since: float) -> list[str]:
    """A line for each log in `logs`, as rule_<rule>/<wildcards>/<job>.log or group_<group>_<rule>/<job>.log, that was last
    written to after `since` (seconds since 1970) and ends with a reason. The executor removes logs of jobs that succeeded."""
    lines: list[str] = []
    for path in sorted(logs.rglob("*.log"), key=lambda p: p.stat().st_mtime):
        if path.stat().st_mtime >= since and (reason := reason_of(path)):
            kind, _, rule = path.relative_to(logs).parts[0].partition("_")
            name = f"several {rule.partition('_')[2]}" if kind == "group" else rule
            lines.append(f"{name}: job {path.stem} {reason} ({path})")
    if len(lines) > MOST:
        return [*lines[:MOST], f"and {len(lines) - MOST} more, whose logs are in {logs}"]
    return lines


def reason_of(log: Path) -> str | None:
    """The first of REASONS that is in a log, or None."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        text = stream.read().decode(errors="replace")
    return next((reason for pattern, reason in REASONS.items() if re.search(pattern, text, flags=re.IGNORECASE)), None)
