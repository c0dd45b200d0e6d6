"""A kind in one new file is configurable, cached and tabulated, a structure tested by the suite too; no other file is touched."""

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
STRUCTURE = '''"""`toy`: the columns of largest norm, the others zero."""

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

METRIC = '''
from typing import Literal

from winnow.metrics.base import Metric, MetricOptions


class Toy(Metric):
    """C = diag(E[x_j^2]) + 1."""

    reference = "a test"
    needs = ("rms",)

    class Options(MetricOptions):
        kind: Literal["toy"]

    def columns(self, weight, site):
        return site["rms"].square() + 1
'''
ALLOCATION = '''
from typing import Literal

from winnow.allocation.base import AllocationOptions
from winnow.allocation.kinds.uniform import Uniform


class Toy(Uniform):
    """As `uniform`."""

    class Options(AllocationOptions):
        kind: Literal["toy"]
'''
RECOVERY = '''
from typing import Literal

from winnow.recovery.base import Recovery, RecoveryOptions


class Toy(Recovery):
    """Every compressed number a little smaller."""

    reference = "a test"

    class Options(RecoveryOptions):
        kind: Literal["toy"]
        factor: float = 0.99

    def recover(self, task):
        for parameter in task.parameters().values():
            parameter.data.mul_(self.options.factor)
        return {"factor": self.options.factor}
'''
EVALUATION = '''
from typing import Literal

from winnow.evaluation.base import Evaluation, EvaluationOptions


class Toy(Evaluation):
    """The mean square of all parameters, over that of the dense model."""

    reference = "a test"
    table = "winnow.evaluation.kinds.toy:tabulate"

    class Options(EvaluationOptions):
        kind: Literal["toy"]

    @classmethod
    def measure(cls, given):
        parameters = list(given.model().parameters())
        square = sum(float(p.double().square().sum()) for p in parameters) / sum(p.numel() for p in parameters)
        dense = given.dense()
        return {"square": square, "ratio": square / dense["square"] if dense else 1.0}


def tabulate(rows, results):
    import pandas as pd

    return pd.DataFrame([{**row, "ratio": results[row["result"]]["ratio"]} for row in rows])
'''
FILES = {
    "structures": STRUCTURE,
    "metrics": METRIC,
    "allocation/kinds": ALLOCATION,
    "recovery/kinds": RECOVERY,
    "evaluation/kinds": EVALUATION,
}


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
