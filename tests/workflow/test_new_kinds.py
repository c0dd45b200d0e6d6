"""A kind in one new file is configurable, cached and tabulated, a structure tested by the suite too; no other file is touched."""

import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.toys import FILES
from tests.workflow.test_end_to_end import Workspace

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with a toy of each kind in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("src", "scripts", "workflow", "tests", "config", "profiles", "resources"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    for package, content in FILES.items():
        (folder / "src" / "winnow" / package / "toy.py").write_text(content)
    return folder


def environment(checkout) -> dict:
    return {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}


def test_the_suite_finds_it(checkout):
    command = [sys.executable, "-m", "pytest", "tests/unit/test_structures.py", "-k", "toy", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=checkout, env=environment(checkout), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "toy" not in done.stderr
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 30, "identities, order, break-even, bad statistics, in every metric that it can use"


def test_they_are_in_the_generated_tables(checkout):
    command = [sys.executable, "-m", "winnow", "config"]
    subprocess.run(command, cwd=checkout, env=environment(checkout), check=True)
    readme = (checkout / "config" / "README.md").read_text()
    assert "| `toy` | none | k columns (m, k), their places (n indices) |" in readme
    assert "`kind: toy`: Every compressed number a little smaller." in readme
    assert "| `toy` | none | a test | C = diag(E[x_j^2]) + 1. |" in readme
    assert '"toy"' in (checkout / "workflow" / "schemas" / "config.schema.json").read_text()


def test_they_run_are_cached_and_tabulated(checkout, tmp_path):
    workspace = Workspace(tmp_path)
    config, one = workspace.config, workspace.config["experiments"]["one"]
    config["methods"] = {"mine": {"structure": {"kind": "toy"}, "metric": {"kind": "toy"}}}
    config["budgets"] = {"half": {"targets": ["ffn"], "keep_bytes": 0.6, "allocation": {"kind": "toy"}}}
    config["recoveries"] = {"none": {"kind": "none"}, "smaller": {"kind": "toy", "factor": 0.5}}
    config["evaluations"]["size"] = {"kind": "toy"}
    one |= {"methods": ["mine"], "budgets": ["half"], "recoveries": ["none", "smaller"]}
    one["evaluations"] = [*one["evaluations"], "size"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--cores", "2", "--replace-workflow-config", "--configfile", str(tmp_path / "config.yaml")]
    for arguments, expected in (([], "steps (100%) done"), (["-n"], "Nothing to be done")):
        done = subprocess.run([*command, *arguments], env=environment(checkout), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert expected in done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "results" / "tables" / "summary.csv")
    rows = table[table["structure"] == "toy"]
    assert (rows["metric"] == "toy").all()
    assert (rows["allocation"] == "toy").all()
    assert (abs(rows["keep_bytes"] - rows["keep_requested"]) < 0.005).all()
    sizes = pd.read_csv(tmp_path / "results" / "tables" / "toy.csv").set_index(["method", "recovery"])["ratio"]
    assert sizes["dense", "none"] == 1
    assert 0.25 < sizes["mine", "smaller"] / sizes["mine", "none"] < 1, "halved where it is compressed"
