"""What the workflow keeps of Snakemake's own work changes no plan."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.workflow


def jobs_of(plan: str) -> list[list[list[str]]]:
    """Of every job that a dry run prints the lines but its number, each as its words, which stand in no certain order."""
    jobs = [job for job in re.split(r"^\[.*\]$", plan, flags=re.MULTILINE) if "    jobid: " in job]
    lines = [[line.strip() for line in job.splitlines() if "jobid: " not in line] for job in jobs]
    return sorted([sorted(re.split("[,:;] ", line)) for line in job] for job in lines)


def test_a_plan_is_the_same_without_it(tmp_path):
    for name in ("Snakefile", "workflow", "scripts", "profiles"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name in ("config", "resources", "src", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    plans = []
    for kept in (True, False):
        if not kept:
            (tmp_path / "workflow/rules/speed.smk").write_text("")
        command = [sys.executable, "-m", "snakemake", "-n", "--cores", "2", "--configfile", "config/studies/recovery.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        plans.append(jobs_of(done.stdout))
    assert len(plans[0]) > 50
    assert plans[0] == plans[1]


JOBS = """
include: "{speed}"

rule all:
    input: expand("{{i}}.txt", i=range(40))

rule one:
    output: "{{i}}.txt"
    shell: "touch {{output}}"

onsuccess:
    import threading
    Path("looks.txt").write_text(str(sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())))
"""


def test_looks_for_jobs_do_not_multiply(tmp_path):
    """Without it, each of 40 jobs leaves looks behind that beget looks."""
    (tmp_path / "Snakefile").write_text(JOBS.format(speed=ROOT / "workflow/rules/speed.smk"))
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "rules", "--max-jobs-per-timespan", "10/1s"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("[0-9]*.txt"))) == 40
    assert int((tmp_path / "looks.txt").read_text()) <= 1
