"""Counts of a run by stage, from the events that Snakemake logs. A stage is a rule with all its jobs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LONG = 10.0  # seconds after which the last line of a job's log is shown
TAIL = 1 << 14  # bytes at the end of a log that are read


@dataclass
class Job:
    """A job that was started or submitted, and has not ended."""

    rule: str
    wildcards: list[str]  # their values
    log: str | None
    target: bool  # it only asks for files of other jobs
    began: float

    def line(self) -> str:
        """What it is, for how long, and what its log says last."""
        took = time.monotonic() - self.began
        said = last_line(self.log) if took > LONG else ""
        return f"{' '.join([self.rule, *self.wildcards])} ({seconds(took)}{': ' if said else ''}{said})"


@dataclass
class Stage:
    """Jobs of one rule: how many in this run, how many have ended well, and when the first began (None before)."""

    name: str
    total: int
    done: int = 0
    failed: int = 0
    began: float | None = None
    started: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    @property
    def took(self) -> float:
        """Seconds since its first job began."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def rate(self) -> str:
        """Jobs per time since the first began; empty before one has ended."""
        if not self.done or not self.took:
            return ""
        per_second = self.done / self.took
        unit, factor = ("s", 1) if per_second >= 1 else ("min", 60) if per_second >= 1 / 60 else ("h", 3600)
        return f"{per_second * factor:.1f}/{unit}"

    def line(self) -> str:
        """Its counts, time and rate."""
        parts = [f"{self.done} of {self.total} done in {seconds(self.took)}", self.rate() if self.total > 1 else ""]
        return ", ".join(part for part in [*parts, f"{self.failed} failed" if self.failed else ""] if part)


class Stages:
    """All stages of a run. `done` and `total` count all jobs, also those that only name targets."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.running: dict[int, Job] = {}
        self.ever: dict[int, Job] = {}  # all that were started
        self.done = self.total = 0

    def plan(self, stats: Mapping[str, int]) -> None:
        """`stats`: jobs by rule, and their `total`, as Snakemake counts them before the first one."""
        self.total = stats.get("total", 0)
        self.stages = {rule: Stage(rule, jobs) for rule, jobs in stats.items() if rule != "total"}

    def start(self, number: int, job: Job) -> Stage | None:
        """A job was started or submitted; returns its stage if it is the first of it."""
        self.running[number] = self.ever[number] = job
        stage = self.stages.setdefault(job.rule, Stage(job.rule, 0))
        stage.started.add(number)
        if len(stage.started) > stage.total:  # a checkpoint found more to do
            stage.total, self.total = stage.total + 1, self.total + 1
        if job.target or stage.began is not None:
            return None
        stage.began = job.began
        return stage

    def finish(self, number: int) -> Stage | None:
        """A job ended well; returns its stage if it was the last of it."""
        if (job := self.running.pop(number, None)) is None:
            return None
        stage = self.stages[job.rule]
        stage.done, self.done = stage.done + 1, self.done + 1
        return stage if stage.complete and not job.target else None

    def fail(self, number: int) -> Job | None:
        """A job failed; it may be started again. Some versions of Snakemake say so twice."""
        if job := self.running.pop(number, None):
            self.stages[job.rule].failed += 1
        return self.ever.get(number)

    def open(self) -> list[Stage]:
        """Stages that began and are not complete."""
        return [stage for stage in list(self.stages.values()) if stage.began is not None and not stage.complete]

    def longest(self, most: int) -> list[Job]:
        """So many of the jobs at work, those that began first."""
        jobs = [job for job in list(self.running.values()) if not job.target]
        return sorted(jobs, key=lambda job: job.began)[:most]

    def line(self) -> str:
        """The counts of all, in the words of Snakemake."""
        return f"{self.done} of {self.total} steps ({self.percent()}) done"

    def percent(self) -> str:
        """Rounded down, so that 100 % means all."""
        return f"{100 * self.done // self.total if self.total else 100}%"


def seconds(took: float) -> str:
    """`1.2 s`, and `1:02:03` from a minute on."""
    if took < 60:
        return f"{took:.1f} s"
    minutes, rest = divmod(int(took), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def last_lines(log: str | os.PathLike[str] | None, most: int) -> list[str]:
    """The last lines of a log that are not empty; none where it cannot be read (yet)."""
    try:
        with open(log or "", "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-most:]


def last_line(log: str | None) -> str:
    """The last line of a log, without its time."""
    lines: Sequence[str] = last_lines(log, 1)
    return re.sub(r"^\d\d:\d\d:\d\d ", "", lines[0]) if lines else ""
