"""Two ways to show the stages of a run: plain lines for files and pipes, bars for terminals."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from snakemake_logger_plugin_winnow.stages import Stage, Stages, seconds

EVERY = 30.0  # seconds between two lines that are about no begin and no end of a stage
FEW = 3  # jobs that are named
REFRESH = 4  # times a second that bars are drawn


def write_line(text: str) -> None:
    """A line on the standard error, written at once: `print` writes its end apart, and another thread may write between."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class View(Protocol):
    """What both ways have in common."""

    def begin(self, stage: Stage) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """Lines on the standard error: when a stage begins and ends, and the state of the run every half a minute."""

    def __init__(self, stages: Stages, every: float = EVERY):
        self.stages, self.every = stages, every
        self.ended = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def begin(self, stage: Stage) -> None:
        self.say(f"{stage.name}: begins, {stage.total} job{'s' * (stage.total > 1)}")

    def say(self, text: str) -> None:
        with suppress(BrokenPipeError):
            write_line(text)

    def close(self) -> None:
        self.ended.set()

    def _tick(self) -> None:
        while not self.ended.wait(self.every):
            jobs = self.stages.longest(FEW)
            if jobs:
                counts = ", ".join(f"{s.name} {s.done}/{s.total}" for s in self.stages.open())
                self.say(f"{self.stages.line()}; {counts}; at work: {'; '.join(job.line() for job in jobs)}")


class Bars:
    """A bar per stage at work below what is printed, and the jobs that have been at work for longest."""

    def __init__(self, stages: Stages):
        """Takes the terminal; to be called before any job starts, since jobs inherit what this process writes to."""
        self.stages = stages
        self.lock = threading.Lock()  # a line that is being printed while the bars end would draw them once more
        terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        self.captured = Captured(self.say)
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=terminal, highlight=False, markup=False, emoji=False)
        self.live = Live(
            get_renderable=self._draw,
            console=self.console,
            refresh_per_second=REFRESH,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.captured.start()

    def begin(self, stage: Stage) -> None:
        with self.lock:
            if not self.live.is_started:
                self.live.start()

    def say(self, text: str) -> None:
        with self.lock:
            self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        with self.lock:
            self.live.stop()  # first, so that nothing is written to the terminal beside the bars
        self.captured.release()

    def _draw(self):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for stage in self.stages.open():
            bar = ProgressBar(total=stage.total, completed=stage.done, width=24)
            failed = Text(f"{stage.failed} failed" if stage.failed else "", style="red")
            grid.add_row(stage.name, bar, f"{stage.done}/{stage.total}", seconds(stage.took), stage.rate(), failed)
        grid.add_row(
            "all stages",
            ProgressBar(total=max(self.stages.total, 1), completed=self.stages.done, width=24),
            f"{self.stages.done}/{self.stages.total}",
            self.stages.percent(),
        )
        jobs = [Text(f"  {job.line()}", style="dim", no_wrap=True, overflow="ellipsis") for job in self.stages.longest(FEW)]
        return Group(grid, *jobs)


class Captured:
    """Whatever is written to the terminal, by this process or a job, handed on line by line: it would tear the bars."""

    END = b"\0end of captured output\n"

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.kept = {stream.fileno(): os.dup(stream.fileno()) for stream in (sys.stdout, sys.stderr) if stream.isatty()}
        read, self.write = os.pipe()
        for number in self.kept:
            os.dup2(self.write, number)
        self.thread = threading.Thread(target=self._hand_on, args=(read,), daemon=True)

    def start(self) -> None:
        """Begin to hand on; until then lines wait."""
        self.thread.start()

    def release(self) -> None:
        """Give the terminal back, when all that was written to it so far has been handed on."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in self.kept.items():
            os.dup2(kept, number)
            os.close(kept)
        os.write(self.write, b"\n" + self.END)
        self.thread.join()

    def _hand_on(self, read: int) -> None:
        with os.fdopen(read, "rb", closefd=False) as stream:  # open to the end: what still writes to it must not fail
            for line in iter(stream.readline, self.END):
                if line.strip():
                    self.say(line.decode(errors="replace").rstrip())
