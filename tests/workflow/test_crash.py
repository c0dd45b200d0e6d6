"""Killed at any moment, the plain command finishes, with the same bytes as a run that was never interrupted."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.workflow.test_rerun_truth import Place

pytestmark = pytest.mark.workflow
KILLS = int(os.environ.get("WINNOW_KILLS", "3"))  # the long form: WINNOW_KILLS=50 pytest tests/workflow/test_crash.py


def place(folder: Path) -> Place:
    place = Place(folder)
    methods = {name: place.config["methods"][name] for name in ("whitened", "clustered")}
    place.config["methods"] = methods
    place.experiment(methods=list(methods))
    return place


def artefacts(folder: Path) -> dict[str, bytes]:
    results = folder / "results"
    left_out = {"logs", "benchmarks"}
    files = [p for p in results.rglob("*") if p.is_file() and p.relative_to(results).parts[0] not in left_out]
    return {str(p.relative_to(results)): p.read_bytes() for p in files}


def different(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of files that are not in both with the same bytes."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """The artefacts of a whole run, and its seconds."""
    whole, began = place(tmp_path_factory.mktemp("whole") / "here"), time.monotonic()
    done = whole.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return artefacts(whole.folder), time.monotonic() - began


def started(place: Place) -> subprocess.Popen:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(**place.command(), **silent, start_new_session=True)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the run and all its jobs at once: they are one process group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_runs_finish_with_the_same_bytes(uninterrupted, tmp_path):
    expected, seconds = uninterrupted
    broken, draw = place(tmp_path / "here"), random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(
            **broken.command(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(3, max(6, 0.8 * seconds)))
        kill_tree(process)
        if KILLS > 10 and draw.random() < 0.3:  # in the long form, start over now and then
            shutil.rmtree(broken.folder / "results", ignore_errors=True)
    done = broken.run()
    assert done.returncode == 0, done.stdout + done.stderr
    found = artefacts(broken.folder)
    assert different(found, expected) == []


def test_a_second_run_in_the_folder_is_refused_in_one_line(tmp_path):
    busy = place(tmp_path / "here")
    first = started(busy)
    try:
        lock = busy.folder / ".snakemake" / "winnow.lock"
        deadline = time.monotonic() + 60
        while not lock.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        second = busy.run()
    finally:
        kill_tree(first)
    assert second.returncode != 0
    lines = [line for line in second.stderr.splitlines() if line.startswith("winnow: ")]
    assert len(lines) == 1
    assert "another run is at work in" in lines[0]
    assert busy.run("-n").returncode == 0
