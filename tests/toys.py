"""A plug-in of each kind, as the text of the file that adds it; FILES has those that a run can compute with."""

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
STUDY = '''
from winnow.studies.base import Study


class Toy(Study):
    """Nothing."""

    title = "Toy"
    reference = "a test"

    def measure(self, given):
        return {}

    def conclude(self, evidence):
        raise NotImplementedError
'''
FILES = {
    "structures": STRUCTURE,
    "metrics": METRIC,
    "allocation/kinds": ALLOCATION,
    "recovery/kinds": RECOVERY,
    "evaluation/kinds": EVALUATION,
}
