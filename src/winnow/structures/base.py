"""The interface of a structure: what is stored instead of one or several matrices, at every size.

Files of this package are read when a workflow is planned, so torch is imported inside functions only.
"""

from __future__ import annotations

import math
import typing
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from winnow.models.architectures import Matrix, group_name
from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.calibration.clusters import Clustering
    from winnow.metrics.base import Metric


EIGEN = 25  # operations of an eigendecomposition of (n, n), over n^3
FORMATS = (1, 2)  # of such checkpoints, which this version reads; it writes the first that is enough, see `format_of`


def format_of(layouts: Any) -> int:
    """The format of a checkpoint with such layouts: 2 where a matrix has zero points, which format 1 does not know."""
    if not isinstance(layouts, dict):
        return 1
    return 2 if layouts.get("zeros") is True else max(map(format_of, layouts.values()), default=1)


class StructureOptions(Options):
    pass


if TYPE_CHECKING:
    AnyStructure = StructureOptions
else:  # the options of any structure: known when all files of the package are read
    AnyStructure = typing.ForwardRef("AnyStructure")


@dataclass(frozen=True)
class Problem:
    """What a group of matrices is fitted on; all dictionaries by matrix name, all numbers float64."""

    group: list[Matrix]
    weights: dict[str, Tensor]  # W (out, in)
    sites: dict[str, dict[str, Tensor]]  # statistics of the input
    metric: Metric | None  # None where the objective is the FFN's output
    precision: float = 2.0**-52  # relative rounding error of the statistics
    biases: dict[str, Tensor] = field(default_factory=dict)  # (out,), of the matrices that have one
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # statistics of the loss's gradient in the output
    labels: dict[str, Tensor] = field(default_factory=dict)  # (channels,) clusters, for structures that ask for them
    metric_weights: dict[str, Tensor] | None = None  # what the metric looks at, where it is not `weights`

    def __post_init__(self) -> None:
        """Raises FloatingPointError, naming the number, if one is not finite."""
        values = [("weight", self.weights.items()), ("bias", self.biases.items())]
        for name, found in (*self.sites.items(), *self.outputs.items()):
            values += [(f"statistic {key}", {name: value}.items()) for key, value in found.items()]
        for what, named in values:
            for name, value in named:
                if not math.isfinite(float(value.sum())):  # without a mask as large as the tensor
                    raise FloatingPointError(f"the {what} of {name} is not finite")

    def columns(self, matrices: list[Matrix] | None = None) -> Tensor:
        """The metric C of matrices (by default of the group): the mean over them, since a shared factor serves all."""
        assert self.metric is not None
        weights, matrices = self.metric_weights or self.weights, matrices or self.group
        parts = [self.metric.columns(weights[m.name], self.sites.get(m.name, {})) for m in matrices]
        return parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0]) / len(parts)

    def rows(self, matrices: list[Matrix] | None = None) -> Tensor | None:
        """The metric of the outputs of matrices stacked along their outputs, diagonal or full; None where it is I."""
        import torch

        assert self.metric is not None
        parts = [self.metric.rows(self.outputs.get(m.name, {})) for m in matrices or self.group]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return torch.cat(found) if found[0].dim() == 1 else torch.block_diag(*found)


@dataclass(frozen=True)
class Fit:
    """Every size at once: tensors whose leading directions are a smaller fit, and the squared error left at each size.

    `error[s]` is the error of size s by the structure's objective (length: largest size + 1); `error[0]` is that of what
    is stored at every size (usually nothing). `spectrum` holds the singular values (or scores) that sizes are ordered by.
    A structure that is `optimised_at_size` reports the errors of its start here.
    """

    tensors: dict[str, Tensor]
    error: Tensor
    spectrum: Tensor


@dataclass(frozen=True)
class Part:
    """What a checkpoint holds in the place of one module: the layout that builds it empty, and its tensors."""

    layout: dict[str, Any]
    tensors: dict[str, Tensor]


class Structure(Plugin):
    """One way to store matrices. A size is the integer that a budget buys (for low rank: the rank)."""

    stores: ClassVar[str]  # for tables of methods: the stored tensors
    formula: ClassVar[str]  # and how many numbers they hold at size k
    # What `Fit.error` measures: the method's metric, or the FFN's output on the calibration tokens (then no metric is used).
    objective: ClassVar[Literal["metric", "ffn_output"]] = "metric"
    bias_name: ClassVar[str | None]  # where the module keeps the bias of its matrix; None: `stored` has the biases itself
    weighs_outputs: ClassVar[bool] = True  # whether it can use a metric's R
    # Whether the fit is finished in `stored`, for the size that is stored; `Fit.error` is then that of its start, a bound.
    optimised_at_size: ClassVar[bool] = False
    predicts: ClassVar[bool] = False  # whether it has `predicted`, which some allocations ask for
    in_float64: ClassVar[tuple[str, ...]] = ()  # fitted tensors that are cached in float64; the others in float32
    Options: ClassVar[type[StructureOptions]]

    def bias_of(self, matrix: Matrix) -> str | None:
        """`bias_name`, for structures that store different matrices in different forms."""
        return self.bias_name

    def needs(self) -> tuple[str, ...]:
        """Statistics of inputs that the structure needs besides those of the method's metric."""
        return ()

    def clustering(self) -> Clustering | None:
        """The assignment of channels to clusters that the fit reads from `Problem.labels`."""
        return None

    def control(self) -> StructureOptions | None:
        """The same structure with a random choice of what it selects; None if it selects nothing, or at random already."""
        return None

    def not_dense(self) -> str | None:
        """Why what it stores is no dense model of the same architecture; None if it is one when multiplied out."""
        return None

    def untrainable(self) -> str | None:
        """Why no recovery can train the numbers that it stores; None if one can."""
        return None

    def refits(self) -> bool:
        """Whether the recovery `sequential` can fit factors of it anew; of several structures, those of any."""
        return any(own.refits() for own in self.alternatives().values() if own is not self)

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        """Which matrices are fitted together (by default every matrix alone); those in no group cannot be compressed so."""
        return [[m] for m in matrices]

    def alternatives(self) -> dict[str, Structure]:
        """The structures that an allocation chooses between, by what their names end in; by default itself alone."""
        return {"": self}

    def fits(self, matrices: list[Matrix]) -> list[tuple[str, Structure, list[Matrix]]]:
        """(name, structure, group) of all that is fitted; a matrix stands once for each alternative that applies to it."""
        found = self.alternatives().items()
        return [(f"{group_name(group)}{end}", own, group) for end, own in found for group in own.groups(matrices)]

    def limit(self, group: list[Matrix]) -> int:
        """The largest size that makes sense, whatever it stores."""
        return min(sum(m.shape[0] for m in group), group[0].shape[1])

    def whole(self, group: list[Matrix]) -> int:
        """The size that `rank_fraction: 1` means."""
        return self.limit(group)

    def largest(self, group: list[Matrix]) -> int:
        """The largest size that can store less than the dense matrices, to be fitted; by bisection on `numbers`."""
        dense = sum(m.shape[0] * m.shape[1] for m in group)
        if self.bias_name is None:
            dense += sum(m.shape[0] for m in group if m.bias)
        low, high = 0, self.limit(group)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.numbers(group, middle, {}) < dense else (low, middle - 1)
        return low

    @abstractmethod
    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        """How many numbers the group stores at `size`, biases counted only if `bias_name` is None. `tensors` are those of
        the fit, for structures whose count depends on data."""

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        """Bytes of the integers that the group stores at `size` (orders, labels, rounded numbers with their scales), which are of
        another dtype than the weights."""
        return 0

    def metric_of_error(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """(C, R) that `Fit.error` is measured in, for the objective `metric`."""
        return problem.columns(), problem.rows()

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, float, float]:
        """(bytes of memory, operations, bytes of the file) of a fit of the group in a metric with such needs, for forecasts."""
        m, n = sum(matrix.shape[0] for matrix in group), max(matrix.shape[1] for matrix in group)
        memory = 8.0 * (4 * m * n + 3 * n * n + 3 * min(m, n) ** 2)
        cached = 4.0 * sum(matrix.shape[0] * matrix.shape[1] for matrix in group)
        return memory, 2.0 * m * n * n + EIGEN * min(m, n) ** 3, cached

    @abstractmethod
    def fit(self, problem: Problem, largest: int) -> Fit:
        """Fit the group once for every size up to `largest`."""

    def judged(self, group: list[Matrix]) -> list[Matrix]:
        """The matrices whose outputs' gradients `predicted` reads."""
        return group

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        """(sizes + 1,): predicted increase of the loss in nats per token at every size of a fit, see `winnow.factors.predict`.
        The problem has the statistics of `needs`, `gram`, and `gradient_gram` of `judged`; they need not be those of the fit."""
        raise NotImplementedError(f"{self.kind()} predicts no loss")

    @abstractmethod
    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        """{module name: its part of the checkpoint} at `size`; biases left out unless `bias_name` is None."""

    def report(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Any] | None:
        """How the optimisation at `size` went, for structures that are `optimised_at_size`: numbers, strings and lists."""
        return None

    @staticmethod
    @abstractmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        """An empty module of this layout for the place of `dense`; its tensors are those of `stored`, and the bias."""

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        """Make the module `name` use tensors that another module stores: {name of the tensor: name where it is stored}."""
        return {}


STRUCTURES: Registry[Structure] = Registry("winnow.structures", Structure, nested="AnyStructure")
