"""What the workflow keeps of Snakemake's own work changes no plan."""

import os
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The project without results."""
    place = tmp_path_factory.mktemp("project")
    for name in ("Snakefile", "workflow", "scripts", "profiles"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    for name in ("config", "resources", "src", "pyproject.toml"):
        (place / name).symlink_to(ROOT / name)
    return place


def planned(folder, *command: str, **environment: str) -> subprocess.CompletedProcess:
    arguments = ["-n", "--cores", "2", "--configfile", "config/studies/recovery.yaml"]
    program = command or (sys.executable, "-m", "snakemake")
    return subprocess.run([*program, *arguments], capture_output=True, text=True, cwd=folder, env=os.environ | environment)


def test_a_plan_is_the_same_without_it(folder):
    plans = []
    for environment in ({}, {"WINNOW_PATCHES": "0"}):
        done = planned(folder, **environment)
        assert done.returncode == 0, done.stderr
        assert "is not known here" not in done.stderr
        plans.append(jobs_of(done.stdout))
    assert len(plans[0]) > 50
    assert plans[0] == plans[1]


OTHER = """
import sys
from snakemake.cli import main
from {module} import {owner}

class Own({owner}):
    {kind} {name}(self, *given, **more):
        return {wait}BEFORE(self, *given, **more)

BEFORE = {owner}.{name}
{owner}.{name} = Own.{name}
sys.argv = ["snakemake", *sys.argv[1:]]
main()
"""
UNKNOWN = r"winnow: {}\.{} of Snakemake [\d.]+ is not known here, so "


@pytest.mark.parametrize(
    ("module", "owner", "name", "kind", "line"),
    [
        ("snakemake.rules", "Rule", "is_producer", "def", r"it is left as it is \(matches every rule with every file\)$"),
        ("snakemake.persistence", "PersistenceBase", "incomplete", "async def", r"it is left as it is \(finished work"),
        ("snakemake.persistence", "PersistenceBase", "has_metadata", "def", r"results without a record .* use a version from"),
    ],
)
def test_what_is_not_known_is_left_alone_or_stops_the_run(folder, tmp_path, module, owner, name, kind, line):
    """Where Snakemake's code is another than what a replacement was written for."""
    program = tmp_path / "program.py"
    wait = "await " if kind.startswith("async") else ""
    program.write_text(OTHER.format(module=module, owner=owner, name=name, kind=kind, wait=wait))
    done = planned(folder, sys.executable, str(program))
    assert re.search(UNKNOWN.format(owner, name) + line, done.stderr, flags=re.MULTILINE), done.stderr
    assert done.returncode == (1 if name == "has_metadata" else 0)
    assert ("Job stats" in done.stdout) == (name != "has_metadata")


JOBS = """
include: "{speed}"

from snakemake.scheduling.job_scheduler import JobScheduler

JobScheduler._schedule_reevalutation = unless_one_comes


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
