"""Scripts in forks of one process make the bytes that they make in interpreters of their own."""

import os
import subprocess
import sys

import pytest

from tests.workflow.test_crash import artefacts, different, place

pytestmark = [pytest.mark.workflow, pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")]

# Python runs this at the start of every interpreter: a line for each that was started for a script.
COUNT = """
import os, sys
if ".snakemake/scripts" in " ".join(sys.orig_argv):
    with open(os.environ["WINNOW_STARTS"], "a") as starts:
        starts.write(sys.orig_argv[-1] + "\\n")
"""


def test_forks_make_the_same_bytes(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(COUNT)
    found, starts = [], []
    for warm in ("1", "0"):
        here, counted = place(tmp_path / warm), tmp_path / f"starts-{warm}"
        here.experiment(methods=["whitened"])
        counted.touch()
        command = here.command("perplexity")
        path = os.pathsep.join([str(tmp_path / "site"), command["env"]["PYTHONPATH"]])
        command["env"] |= {"WINNOW_WARM": warm, "WINNOW_STARTS": str(counted), "PYTHONPATH": path}
        done = subprocess.run(**command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(artefacts(here.folder))
        starts.append(len(counted.read_text().splitlines()))
    assert different(*found) == []
    assert starts[0] == 0
    assert starts[1] > 5
