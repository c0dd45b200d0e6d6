"""A script in a fork runs as in an interpreter of its own."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest

from winnow.jobs.fork import PRELOADED, run_script

REPORT = """
import json, os, sys, tempfile
import numpy, torch
from threadpoolctl import threadpool_info
blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
set_by_libraries = ("LC_CTYPE", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK")
known = {name: value for name, value in os.environ.items() if name not in set_by_libraries}
found = [sys.argv, __name__, os.getcwd(), known, tempfile.gettempdir(), torch.get_num_threads(), blas]
json.dump(found, open("report.json", "w"))
"""


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "winnow.jobs.fork"])
    return context


def fork(forks, path, folder, threads, environment) -> int:
    process = forks.Process(target=run_script, args=(str(path), str(folder), threads, environment))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")
@pytest.mark.parametrize("threads", [1, 2])
def test_sees_what_an_interpreter_would(forks, tmp_path, threads):
    (tmp_path / "temporary").mkdir()
    path = tmp_path / "script.py"
    path.write_text(REPORT)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = {**kept, "TMPDIR": str(tmp_path / "temporary"), **dict.fromkeys(names, str(threads))}
    subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, check=True)
    expected = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").unlink()
    assert fork(forks, path, tmp_path, threads, environment) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")
@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(3)", 3), ("raise ValueError('no')", 1), ("raise KeyboardInterrupt", 1), ("os.kill(os.getpid(), 9)", -9)],
)
def test_ends_as_an_interpreter_would(forks, tmp_path, ending, code):
    """And what the script made of errors is asked."""
    path = tmp_path / "script.py"
    hook = "sys.excepthook = lambda kind, error, trace: open('said', 'w').write(f'{kind.__name__}: {error}')"
    path.write_text(textwrap.dedent(f"import os, sys\n{hook}\n{ending}\n"))
    assert fork(forks, path, tmp_path, 1, dict(os.environ)) == code
    if code == 1:
        assert (tmp_path / "said").read_text() in ("ValueError: no", "KeyboardInterrupt: ")


@pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")
def test_what_was_imported_before_is_not_collected(forks, tmp_path):
    """A collection that looked at it would copy the memory that all forks share, in each of them."""
    path = tmp_path / "script.py"
    path.write_text("import gc, sys\nsys.exit(0 if gc.get_freeze_count() > 10_000 > len(gc.get_objects()) else 1)\n")
    assert fork(forks, path, tmp_path, 1, dict(os.environ)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")
def test_a_module_that_is_to_be_there_and_is_not_fails_the_job(tmp_path):
    context = multiprocessing.get_context("forkserver")  # whose server leaves out what it cannot import
    (tmp_path / "script.py").write_text("open('ran', 'w')")
    given = (str(tmp_path / "script.py"), str(tmp_path), 1, dict(os.environ), ("json", "winnow.allocation.kinds.nonexistent"))
    process = context.Process(target=run_script, args=given)
    process.start()
    process.join()
    assert process.exitcode == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", PRELOADED)
def test_what_is_preloaded_exists(name):
    assert importlib.util.find_spec(name) is not None
