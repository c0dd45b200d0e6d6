"""A logger for Snakemake that counts jobs by stage: `snakemake --logger winnow`, which profiles/default selects.

On a terminal it draws a bar for every stage at work; elsewhere it prints a line when a stage begins, a line when it ends, and the
state of the run every half a minute. Errors, warnings and messages that are not about single jobs are printed as they come.
Everything that Snakemake says about jobs is in the file under `.snakemake/log` that is named at the end. Dry runs, and runs with
`--verbose`, `--debug-dag` or `--printshellcmds`, print the same as without this logger. `--quiet progress` leaves out the stages,
`--quiet all` everything but errors.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from importlib.util import find_spec
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase

from snakemake_logger_plugin_winnow.stages import Job, Stages, last_lines
from snakemake_logger_plugin_winnow.views import Bars, Lines, View, write_line

__all__ = ["LogHandler"]
BARS = 3  # jobs from which on bars are drawn
LAST = 20  # lines of the log of a job that failed
# Said about every job, or in every run, without news: in the log file alone.
ROUTINE = re.compile(
    r"None$|$|Select jobs to execute|Execute \d+ jobs|Building DAG of jobs|Assuming unrestricted shared filesystem|Using shell:"
    r"|host:|Group jobs: inactive|Touching output file|Removing temporary output|Write-protecting output file"
    r"|Job \d+ has been submitted|Submitted array job"
)


class LogHandler(LogHandlerBase):
    """What Snakemake asks of a logger. Records come one after the other, in a thread of its own."""

    def __post_init__(self) -> None:
        given = self.common_settings
        self.quiet = {str(part).rpartition(".")[2].lower() for part in given.quiet or ()}
        self.own = self._snakemakes() if given.dryrun or given.verbose or given.debug_dag or given.printshellcmds else None
        self.stages = Stages()
        self.view: View | None = None

    writes_to_stream = True  # type: ignore[assignment]
    writes_to_file = False  # type: ignore[assignment]
    has_formatter = False  # type: ignore[assignment]
    needs_rulegraph = False  # type: ignore[assignment]

    @property
    def has_filter(self) -> bool:
        """Snakemake's own where its own messages are printed."""
        return self.own is None

    def _snakemakes(self) -> logging.Handler:
        """What prints to the terminal without this logger."""
        from snakemake.logging import ColorizingTextHandler

        stream = sys.stdout if self.common_settings.stdout else sys.stderr
        return ColorizingTextHandler(nocolor=self.common_settings.nocolor, stream=stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Count what happened to a job, or print a message."""
        try:
            if self.own:
                self.own.setFormatter(self.formatter)
                self.own.emit(record)
            else:
                self._show(str(getattr(record, "event", None) or ""), record)
        except BrokenPipeError:  # whoever read has enough
            pass
        except Exception:  # noqa: BLE001 - a record that is not understood stops no run
            self.handleError(record)

    def _show(self, event: str, record: Any) -> None:
        if event == "workflow_started":
            self._open()
        elif event == "run_info":
            self.stages.plan(record.stats)
            if self.stages.total < BARS and isinstance(self.view, Bars):
                self.view.close()
                self.view = Lines(self.stages)
            self._say(f"{self.stages.total} job{'s' * (self.stages.total > 1)}")
        elif event == "job_info":
            stage = self.stages.start(record.jobid, _job(record))
            if stage and self.view:
                self.view.begin(stage)
        elif event == "job_finished":
            if stage := self.stages.finish(record.job_id):
                self._say(f"{stage.name}: {stage.line()}")
            if self.stages.done == self.stages.total:
                self._end(self.stages.line())
        elif event == "job_error":
            self._print(_failure(record, self.stages.fail(record.jobid)))
        elif record.levelno >= logging.ERROR or (not event and self._wanted(record)):
            self._print(self.format(record))

    def _wanted(self, record: Any) -> bool:
        """Whether a message is printed that is no event."""
        if "all" in self.quiet or str(getattr(record, "quietness", "")).rpartition(".")[2].lower() in self.quiet:
            return False
        return record.levelno >= logging.WARNING or not ROUTINE.match(record.getMessage())

    def _open(self) -> None:
        if not self.quiet & {"all", "progress"}:
            terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and find_spec("rich")
            self.view = Bars(self.stages) if terminal else Lines(self.stages)

    def _say(self, text: str) -> None:
        """About stages, which `--quiet progress` leaves out."""
        if not self.quiet & {"all", "progress"}:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.view and text:
            self.view.say(text)
        elif text:
            write_line(text)

    def _end(self, text: str) -> None:
        """The last line about stages; what Snakemake and the workflow say after it is printed without bars."""
        self._say(text)
        if self.view:
            self.view.close()
        self.view = None

    def close(self) -> None:
        """Of a run that stopped before its end, say how far every stage came."""
        if self.view:
            self._end("\n".join(f"{stage.name}: {stage.line()}" for stage in self.stages.open()))
        super().close()


def _job(record: Any) -> Job:
    values = [str(value) for value in (record.wildcards or {}).values()]
    log = record.log[0] if record.log else None
    return Job(record.rule_name, values, log, target=not (record.output or record.log), began=time.monotonic())


def _failure(record: Any, job: Job | None) -> str:
    """Which job failed, where its log is, and its last lines."""
    lines = [f"Error in rule {record.rule_name}:"]
    facts = {
        "message": record.rule_msg,
        "jobid": record.jobid,
        "wildcards": " ".join(job.wildcards) if job else "",
        "output": ", ".join(record.output or []),
        "log": ", ".join(record.log or []),
        "shell": record.shellcmd,
        **(record.aux or {}),
    }
    lines += [f"    {name}: {fact}" for name, fact in facts.items() if fact not in (None, "")]
    for log in record.log or []:
        said = [f"        {line}" for line in last_lines(log, LAST)]
        lines += [f"    last lines of {log}:", *said] if said else [f"    {log} is empty, or was not written"]
    return "\n".join(lines)
