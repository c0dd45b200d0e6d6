"""A structure in one new file is configurable, cached, tested by the suite and tabulated; no other file is touched."""

import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.workflow.test_end_to_end import Workspace

pytestmark = pytest.mark.workflow
TOY = '''"""`toy`: the columns of largest norm, the others zero."""

from __future__ import annotations

from typing import Any, Literal

from winnow.models.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions


class Toy(Structure):
    """The k columns of W that the metric's diagonal and their norm make largest."""

    reference = "a test"
    stores = "k columns (m, k), their places (n indices)"
    formula = "k m"
    bias_name = "bias"
    weighs_outputs = False

    class Options(StructureOptions):
        kind: Literal["toy"]

    def limit(self, group: list[Matrix]) -> int:
        return group[0].shape[1]

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Any]) -> int:
        return size * group[0].shape[0]

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return group[0].shape[1] * 2

    def metric_of_error(self, problem: Problem) -> tuple[Any, Any]:
        columns = problem.columns()
        return columns if columns.dim() == 1 else columns.diagonal(), None

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        (weight,) = problem.weights.values()
        energy = weight.square().sum(0) * self.metric_of_error(problem)[0]
        order = energy.argsort(descending=True, stable=True)
        left = energy[order].flip(0).cumsum(0).flip(0)
        error = torch.cat([left, left.new_zeros(1)])[: largest + 1]
        return Fit({"kept": weight[:, order], "order": order}, error, energy[order].sqrt())

    def stored(self, group: list[Matrix], tensors: dict[str, Any], size: int) -> dict[str, Part]:
        import torch

        kept = tensors["kept"][:, :size]
        layout = {"kind": self.kind(), "rank": size, "in": group[0].shape[1], "out": group[0].shape[0]}
        own = {"0.weight": kept, "order": tensors["order"].to(torch.int16), "weight": kept.new_empty(0)}
        return {group[0].module: Part(layout, own)}

    @staticmethod
    def module(layout: dict[str, Any], dense: Any) -> Any:
        from torch import nn

        from winnow.numerics.modules import Constant, SplitLinear, has_bias

        k, n, m = layout["rank"], layout["in"], layout["out"]
        return SplitLinear({"0": nn.Linear(k, m, bias=False), "1": Constant(m, 0.0)}, [k, n - k], True, m * has_bias(dense))
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with the toy in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("src", "scripts", "workflow", "tests", "config", "profiles", "resources"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "src" / "winnow" / "structures" / "toy.py").write_text(TOY)
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


def test_it_is_in_the_generated_tables(checkout):
    command = [sys.executable, "-m", "winnow", "config"]
    subprocess.run(command, cwd=checkout, env=environment(checkout), check=True)
    assert "| `toy` | none | k columns (m, k), their places (n indices) |" in (checkout / "config" / "README.md").read_text()
    assert '"toy"' in (checkout / "workflow" / "schemas" / "config.schema.json").read_text()


def test_it_runs_is_cached_and_tabulated(checkout, tmp_path):
    workspace = Workspace(tmp_path)
    workspace.config["methods"] = {"mine": {"structure": {"kind": "toy"}, "metric": {"kind": "gram"}}}
    workspace.config["experiments"]["one"]["methods"] = ["mine"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(workspace.config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--cores", "2", "--replace-workflow-config", "--configfile", str(tmp_path / "config.yaml")]
    for arguments, expected in (([], "steps (100%) done"), (["-n"], "Nothing to be done")):
        done = subprocess.run([*command, *arguments], env=environment(checkout), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert expected in done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "results" / "tables" / "summary.csv")
    rows = table[table["structure"] == "toy"]
    assert len(rows) == 2
    assert (abs(rows["keep_bytes"] - rows["keep_requested"]) < 0.005).all()
