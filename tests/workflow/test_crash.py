"""Killed at any moment, the plain command finishes, with the same bytes as a run that was never interrupted."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.workflow.test_rerun_truth import Place
from winnow.io.artifacts import read_json
from winnow.io.resume import SECONDS

pytestmark = pytest.mark.workflow
KILLS = int(os.environ.get("WINNOW_KILLS", "3"))  # the long form: WINNOW_KILLS=50 pytest tests/workflow/test_crash.py

# What the report tells of the seconds of its jobs, and its seal, which is a digest of them too.
TIMES = re.compile(rb'<td class="time">.*?</td>|<section id="times">.*?</section>|<!-- .*? -->', re.DOTALL)


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
    return {
        str(p.relative_to(results)): TIMES.sub(b"", p.read_bytes()) if p.name == "report.html" else p.read_bytes() for p in files
    }


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
    """A run in the background, whose long stages save what they have reached all the time."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = place.command()
    command["env"] = command["env"] | {SECONDS: "0"}
    return subprocess.Popen(**command, **silent, start_new_session=True)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the run and all its jobs at once: they are one process group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_runs_finish_with_the_same_bytes_in_any_folder(uninterrupted, tmp_path):
    expected, seconds = uninterrupted
    broken, draw = place(tmp_path / "here"), random.Random(0)
    longest = max(6, 0.8 * seconds) if KILLS <= 10 else 20  # every run goes on where the last one was killed
    for kill in range(KILLS):
        process = started(broken)
        time.sleep(draw.uniform(3, longest))
        kill_tree(process)
        print(f"kill {kill + 1}: {len(artefacts(broken.folder))} files", flush=True)
        if KILLS > 10 and draw.random() < 0.3:  # in the long form, start over now and then
            shutil.rmtree(broken.folder / "results", ignore_errors=True)
    done = broken.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert different(artefacts(broken.folder), expected) == []


@pytest.mark.slow
def test_one_thread_and_two_agree(uninterrupted, tmp_path):
    """The whole run had two for the statistics; what differs is below 1e-6 nats."""
    single = place(tmp_path / "here")
    done = single.run("perplexity", "--cores", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [path for path in artefacts(single.folder) if path.endswith(".json") and "/none-" in path]
    assert len(results) == 2
    for name in results:
        whole = json.loads(uninterrupted[0][name])
        assert read_json(single.folder / "results" / name)["nll"] == pytest.approx(whole["nll"], abs=1e-6)


def wait_for_go(place: Place) -> None:
    """Makes the job of the statistics wait, when it has written its results, for a file `go` in the run's folder."""
    script = place.code / "scripts" / "collect_statistics.py"
    code = script.read_text()
    assert "from pathlib import Path" in code
    script.write_text(code + "    import time\n\n    while not Path('go').exists():\n        time.sleep(0.1)\n")


def test_a_second_run_in_the_folder_is_refused_in_one_line(tmp_path):
    busy = place(tmp_path / "here")
    wait_for_go(busy)  # the first is still at work, however long the second takes to start
    first = started(busy)
    try:
        lock = busy.folder / ".snakemake" / "winnow.lock"
        deadline = time.monotonic() + 60
        while not lock.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = busy.run()
    finally:
        kill_tree(first)
    assert second.returncode != 0
    lines = [line for line in second.stderr.splitlines() if line.startswith("winnow: ")]
    assert len(lines) == 1
    assert "another run is at work in" in lines[0]
    assert busy.run("-n").returncode == 0


def test_an_interrupted_run_keeps_what_its_last_job_finished(tmp_path):
    """SIGINT to the run alone: it waits for the job, which seals its results, but does not record that it ended."""
    here = place(tmp_path / "here")
    wait_for_go(here)
    everything = here.planned()
    said = here.folder.parent / "said.txt"
    with open(said, "w") as stream:
        # What is started in the background of a shell ignores SIGINT, and so would all that it starts.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
        process = subprocess.Popen(**here.command(), stdout=stream, stderr=stream, **heard)
    made, deadline = {}, time.monotonic() + 120
    while len(made) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        found = {path.name: path for path in here.folder.glob("results/*/*/statistics/**/*") if path.is_file()}
        made = {name: path for name, path in found.items() if name in ("manifest.json", "channels.parquet")}
    process.send_signal(signal.SIGINT)
    while "Terminating processes on user request" not in said.read_text() and process.poll() is None:
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)  # the job goes on
    (here.folder / "go").touch()
    process.wait()
    assert len(made) == 2, "the job wrote all it had to"
    incomplete = here.folder / ".snakemake" / "incomplete"
    assert list(incomplete.iterdir()), "Snakemake knows of a job that it did not see end"
    done = Counter(retrieve_model=1, retrieve_text=2, check_overlap=1, tokenize=2, collect_statistics=1, assign_clusters=1)
    rest = here.planned()
    assert rest["collect_statistics"] == 0
    assert rest - everything == Counter()
    assert everything - rest <= done + Counter(evaluate_dense=1, factorize=1, measure_spectra=1)
    whole = made["channels.parquet"].read_bytes()
    made["channels.parquet"].write_bytes(whole[:-8])
    assert here.planned()["collect_statistics"] == 1, "what is damaged was not finished"
    made["channels.parquet"].write_bytes(whole)
    ended = here.run()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Forced execution" not in ended.stdout + ended.stderr
    assert here.planned() == Counter()
    assert not list(incomplete.iterdir())
