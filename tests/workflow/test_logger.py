"""The logger that counts jobs by stage, in runs of a small Snakefile: in a pipe, on a terminal, and where it is silent."""

import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from snakemake_logger_plugin_winnow import LogHandler, stages
from snakemake_logger_plugin_winnow.views import Lines

pytestmark = pytest.mark.workflow
SNAKEFILE = """
rule all:
    input:
        expand("{n}.txt", n=range(4)),
        "sum.txt",
rule write:
    output: "{n}.txt"
    log: "logs/{n}.log"
    shell: "echo heard {wildcards.n} >&2; echo a line > {log}; echo {wildcards.n} > {output}"
rule add:
    input: expand("{n}.txt", n=range(4))
    output: "sum.txt"
    log: "logs/sum.log"
    shell: "cat {input} > {output}"
rule broken:
    output: "{name}.broken"
    log: "logs/{name}.log"
    shell: "echo the reason > {log}; exit 3"
onsuccess:
    print("the last word")
"""
VARYING = r"(Workflow ID|Command|Date): .*|\[.*\]"


def command(*arguments: str, logger: bool = True) -> list[str]:
    chosen = ["--logger", "winnow"] if logger else []
    return [sys.executable, "-m", "snakemake", "--nolock", *chosen, "--cores", "1", *arguments]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return tmp_path


def run(folder: Path, *arguments: str, logger: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # Snakemake prints sets
    return subprocess.run(command(*arguments, logger=logger), cwd=folder, capture_output=True, text=True, env=environment)


def on_terminal(folder: Path, *arguments: str) -> str:
    """All that a run writes to a terminal, standard output and error."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command(*arguments), cwd=folder, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    written = b""
    try:
        while part := os.read(parent, 65536):
            written += part
    except OSError:  # what Linux says when the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_in_a_pipe_a_stage_has_a_line_at_its_begin_and_at_its_end(folder):
    done = run(folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Complete log", "Elapsed", "heard"))]
    lines = [re.sub(r"in [\d.]+ s(, [\d.]+/\w+)?", "in T", line) for line in lines]
    write = ["write: begins, 4 jobs", "write: 4 of 4 done in T"]
    add = ["add: begins, 1 job", "add: 1 of 1 done in T"]
    assert lines == ["6 jobs", *write, *add, "6 of 6 steps (100%) done"]
    assert done.stderr.count("heard") == 4, "what jobs write is kept"
    assert done.stdout == "the last word\n"
    again = run(folder)
    assert "Nothing to be done" in again.stderr


def test_on_a_terminal_bars_are_drawn_and_nothing_is_lost(folder):
    written = on_terminal(folder)
    assert re.search(r"all stages\S* .*━", written)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    for words in (*(f"heard {n}" for n in range(4)), "write: 4 of 4 done", "6 of 6 steps (100%) done", "the last word"):
        assert plain.count(words) == 1, words
    assert plain.index("6 of 6 steps") < plain.index("the last word")
    assert "━" not in plain[plain.index("the last word") :]
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_failure_is_told_with_what_the_log_says_however_quiet(folder):
    for quiet in ([], ["--quiet", "rules"], ["--quiet"], ["--quiet", "all"]):
        done = run(folder, "one.broken", "two.broken", "0.txt", "--keep-going", *quiet)
        assert done.returncode == 1
        for name in ("one", "two"):
            facts = ["jobid: .*", f"wildcards: {name}", f"output: {name}.broken", f"log: logs/{name}.log"]
            assert re.search("\n    ".join(["Error in rule broken:", *facts]), done.stderr), done.stderr
            assert f"    last lines of logs/{name}.log:\n        the reason\n" in done.stderr
        counted = quiet in ([], ["--quiet", "rules"])
        assert ("broken: 0 of 2 done" in done.stderr) == counted
        assert ("write: 1 of 1 done" in done.stderr) == counted
        (folder / "0.txt").unlink()


@pytest.mark.parametrize("arguments", [["-n"], ["-n", "--quiet", "rules"], ["--list"], ["--summary"]], ids=" ".join)
def test_what_plans_or_lists_prints_the_same_as_without_it(folder, arguments):
    own, without = (  # in whatever order jobs that wait for nothing are listed
        sorted(re.sub("Workflow ID.*|Command.*|Date.*|\\[.*\\]", "", run(folder, *arguments, logger=on).stdout).splitlines())
        for on in (1, 0)
    )
    assert own == without != []


def test_a_run_that_asks_for_commands_has_snakemakes_messages(folder):
    done = run(folder, "0.txt", "-p")
    assert "Select jobs to execute..." in done.stderr
    assert "write: " not in done.stderr


def record(event: str | None, text: str = "", level: int = logging.INFO, **extra) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", level, "", 0, text, None, None)
    made.__dict__.update(event=event, **extra)
    return made


def info(number: int, wildcards: dict, log: Path) -> logging.LogRecord:
    return record("job_info", jobid=number, rule_name="fit", wildcards=wildcards, output=["x"], log=[str(log)])


def test_a_job_that_takes_long_shows_the_last_line_of_its_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "LONG", 0.0)
    quiet = {"quiet": None, "dryrun": False, "verbose": False, "debug_dag": False, "printshellcmds": False}
    handler = LogHandler(SimpleNamespace(**quiet), None)
    handler.setFormatter(logging.Formatter())
    handler.emit(record("run_info", stats={"fit": 3, "total": 3}))
    (tmp_path / "a.log").write_text("12:00:01 3 of 9 layers, 5.0 s\n12:00:06 6 of 9 layers, 10.0 s\n\n")
    for number, name in enumerate(("a", "absent")):
        handler.emit(info(number, {"model": name}, tmp_path / f"{name}.log"))
    lines = Lines(handler.stages, every=0.01)
    time.sleep(0.2)
    lines.close()
    (last, *_) = capsys.readouterr().err.splitlines()[1:]
    assert re.fullmatch(
        r"0 of 3 steps \(0%\) done; fit 0/3; at work: fit a \([\d.]+ s: 6 of 9 layers, 10\.0 s\); fit absent \([\d.]+ s\)", last
    )
    handler.emit(record("job_finished", job_id=0))
    handler.emit(record("job_error", jobid=1, rule_name="fit", rule_msg=None, output=["x"], log=[], shellcmd=None, aux={}))
    handler.emit(info(1, {"model": "absent"}, tmp_path / "absent.log"))  # again, as with `retries`
    handler.emit(record("job_finished", job_id=1))
    (stage,) = handler.stages.open()
    assert (stage.done, stage.failed, stage.total) == (2, 1, 3)
    handler.emit(record(None, "Select jobs to execute..."))
    handler.emit(record(None, "Job 3 has been submitted with SLURM jobid 12 (log: x)."))
    handler.emit(record(None, "Select another disk", logging.WARNING))
    handler.emit(record("group_error", "Error in group evaluate", logging.ERROR))
    assert capsys.readouterr().err.splitlines()[-2:] == ["Select another disk", "Error in group evaluate"]


def test_a_line_is_one_write(monkeypatch):
    """So that what another thread writes cannot come between a line and its end."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    view = Lines(stages.Stages(), every=1000)
    view.say("2 jobs")
    view.close()
    assert written == ["2 jobs\n"]
