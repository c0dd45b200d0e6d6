"""The interface of a structure: what is stored instead of one or several matrices, at every size.

This package is imported when a workflow is planned, so torch is only imported inside functions.
"""

from __future__ import annotations

import math
import typing
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from winnow.models.architectures import Matrix, group_name
from winnow.numerics.operations import EIGEN, Operations
from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.calibration.clusters import Clustering
    from winnow.metrics.base import Metric


# What can be asked to run a compressed model as it is stored, see `Structure.runs`.
RUNTIMES = {
    "any": "every size",
    "torch": "products of small dense matrices, and rounded matrices for which PyTorch has kernels: groups of 32, 64, 128 or 256 "
    "inputs, and a multiple of 16 outputs",
    "vllm": "every structure, but no rounded matrices with a rotation, a changed activation of the FFN (affine_block, "
    "split_affine) only where gate and up are two matrices, and no compressed embeddings or head",
    "compressed-tensors": "rounded matrices as vLLM reads their export: up to 8 bits (7 with zero points), groups of the whole "
    "row or with a largest common divisor with it of 32, 64 or 128; no compressed embeddings",
    "gguf": "smaller FFNs, and rounded matrices of up to 8 bits (7 with zero points) in groups that are multiples of 32 or the "
    "whole row, of rows that 32 divides",
}
Runtime = Literal["any", "torch", "vllm", "compressed-tensors", "gguf"]
FORMATS = (1, 2, 3)  # checkpoint formats that this version reads; it writes the lowest that suffices, see `format_of`


def format_of(layouts: Any) -> int:
    """The format of a checkpoint with these layouts: 3 if a matrix is rotated or embeddings are compressed, 2 if a matrix has
    zero points, otherwise 1."""
    if not isinstance(layouts, dict):
        return 1
    newest = rotates(layouts) or layouts.get("embeddings") is True
    own = 3 if newest else 2 if layouts.get("zeros") is True else 1
    return max([own, *map(format_of, layouts.values())])


def rotates(layout: Any) -> bool:
    """Whether a layout, or one within it, has a rotation."""
    return isinstance(layout, dict) and (isinstance(layout.get("rotation"), str) or any(map(rotates, layout.values())))


class StructureOptions(Options):
    pass


if TYPE_CHECKING:
    AnyStructure = StructureOptions
else:  # the options of any structure: known when all files of the package are read
    AnyStructure = typing.ForwardRef("AnyStructure")


@dataclass(frozen=True)
class Problem:
    """The inputs of a fit of a group of matrices; all dictionaries by matrix name, all numbers float64."""

    group: list[Matrix]
    weights: dict[str, Tensor]  # W (out, in)
    sites: dict[str, dict[str, Tensor]]  # statistics of the input
    metric: Metric | None  # None if the objective is the FFN's output
    precision: float = 2.0**-52  # relative rounding error of the statistics
    biases: dict[str, Tensor] = field(default_factory=dict)  # (out,), of the matrices that have one
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # statistics of the gradient of the loss at the output
    labels: dict[str, Tensor] = field(default_factory=dict)  # (channels,) clusters, for structures that need them
    metric_weights: dict[str, Tensor] | None = None  # the weights that the metric is computed from, if not `weights`

    def __post_init__(self) -> None:
        """Raises FloatingPointError, with the name of the tensor, if a number is not finite."""
        values = [("weight", self.weights.items()), ("bias", self.biases.items())]
        for name, found in (*self.sites.items(), *self.outputs.items()):
            values += [(f"statistic {key}", {name: value}.items()) for key, value in found.items()]
        for what, named in values:
            for name, value in named:
                if not math.isfinite(float(value.sum())):  # without a mask as large as the tensor
                    raise FloatingPointError(f"the {what} of {name} is not finite")

    def columns(self, matrices: list[Matrix] | None = None) -> Tensor:
        """The metric C of matrices (default: all of the group): the mean over them, since they share a factor."""
        assert self.metric is not None
        weights, matrices = self.metric_weights or self.weights, matrices or self.group
        parts = [self.metric.columns(weights[m.name], self.sites.get(m.name, {})) for m in matrices]
        return parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0]) / len(parts)

    def rows(self, matrices: list[Matrix] | None = None) -> Tensor | None:
        """The metric R of matrices stacked along their outputs, diagonal or full; None for I."""
        import torch

        assert self.metric is not None
        parts = [self.metric.rows(self.outputs.get(m.name, {})) for m in matrices or self.group]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return torch.cat(found) if found[0].dim() == 1 else torch.block_diag(*found)


@dataclass(frozen=True)
class Fit:
    """A fit of every size at once: tensors whose leading directions are the smaller fits, and the squared error of every size.

    `error[s]` is the error of size s by the structure's objective (length: largest size + 1); `error[0]` is that of the parts
    stored at every size (usually none). `spectrum`: the singular values (or scores) by which sizes are ordered. For a structure
    that is `optimised_at_size` the errors are those of its initial values.
    """

    tensors: dict[str, Tensor]
    error: Tensor
    spectrum: Tensor


@dataclass(frozen=True)
class Part:
    """The replacement of one module in a checkpoint: the layout from which it is built empty, and its tensors."""

    layout: dict[str, Any]
    tensors: dict[str, Tensor]


class Structure(Plugin):
    """One way to store matrices. A size is the integer that a budget determines (for low rank: the rank)."""

    stores: ClassVar[str]  # the stored tensors, for tables of methods
    formula: ClassVar[str]  # and their number of elements at size k
    # What `Fit.error` measures: the method's metric, or the FFN's output on the calibration tokens (then no metric is used).
    objective: ClassVar[Literal["metric", "ffn_output"]] = "metric"
    bias_name: ClassVar[str | None]  # the name of the bias within the module; None: `stored` includes the biases
    weighs_outputs: ClassVar[bool] = True  # whether it can use a metric's R
    # Whether the fit is finished in `stored`, for the stored size; `Fit.error` is then an upper bound, of its initial values.
    optimised_at_size: ClassVar[bool] = False
    engines: tuple[str, ...] = ("torch", "vllm")  # the `RUNTIMES` that run at least some of its sizes
    keeps_activation: ClassVar[bool] = True  # whether the FFN has its own activation, on all channels
    predicts: bool = False  # whether it implements `predicted`, which some allocations need
    outer: bool = False  # whether it stores embeddings and heads, which can have very many rows
    timed: bool = False  # whether it implements `layouts`, by which the time of a size is measured without a fit
    in_float64: ClassVar[tuple[str, ...]] = ()  # fitted tensors that are cached in float64; the others in float32
    Options: ClassVar[type[StructureOptions]]

    def bias_of(self, matrix: Matrix) -> str | None:
        """`bias_name` for this matrix; for structures that store matrices in different forms."""
        return self.bias_name

    def needs(self) -> tuple[str, ...]:
        """Input statistics that the structure needs in addition to those of the method's metric."""
        return ()

    def clustering(self) -> Clustering | None:
        """The assignment of channels to clusters that the fit reads from `Problem.labels`."""
        return None

    def control(self) -> StructureOptions | None:
        """The same structure with a random selection; None if it selects nothing, or already at random."""
        return None

    def not_dense(self) -> str | None:
        """Why it cannot be exported as a dense model of the same architecture; None if it can."""
        return None

    def untrainable(self) -> str | None:
        """Why a recovery with `rounded: fixed` has nothing to train; None if it has."""
        return None

    def refits(self) -> bool:
        """Whether the recovery `sequential` can refit its factors or round its numbers again; for several structures, those of
        any of them."""
        return any(own.refits() for own in self.alternatives().values() if own is not self)

    def rounds(self) -> bool:
        """Whether it stores rounded matrices, alone or as parts; for several structures, whether any of them does."""
        return any(own.rounds() for own in self.alternatives().values() if own is not self)

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        """The groups of matrices that are fitted together (default: each matrix alone); matrices in no group are unsupported."""
        return [[m] for m in matrices]

    def supported(self, matrices: list[Matrix]) -> list[Matrix]:
        """The matrices without embeddings and heads, unless it stores them."""
        return [m for m in matrices if self.outer or not m.outer]

    def alternatives(self) -> dict[str, Structure]:
        """{suffix of its names: structure} between which an allocation chooses; by default only this one."""
        return {"": self}

    def fits(self, matrices: list[Matrix]) -> list[tuple[str, Structure, list[Matrix]]]:
        """(name, structure, group) of all fits; a matrix is included once for each alternative that supports it."""
        found = self.alternatives().items()
        return [(f"{group_name(group)}{end}", own, group) for end, own in found for group in own.groups(own.supported(matrices))]

    def limit(self, group: list[Matrix]) -> int:
        """The largest meaningful size, regardless of its bytes."""
        return min(sum(m.shape[0] for m in group), group[0].shape[1])

    def whole(self, group: list[Matrix]) -> int:
        """The size of `rank_fraction: 1`."""
        return self.limit(group)

    def largest(self, group: list[Matrix]) -> int:
        """The largest size to be fitted: the largest that can store less than the dense matrices, by bisection on `numbers`."""
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
        """The number of stored elements of the group at `size`; biases are counted only if `bias_name` is None. `tensors` are
        those of the fit, for structures whose count depends on data."""

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        """Whether a runtime computes with what is stored of the group at `size`, instead of with a dense matrix that is made from
        it; `any` asks for nothing."""
        joined = any(m.role == "gate_up_proj" for m in group)  # vLLM's activation would have to pass channels of one matrix
        return runtime == "any" or (runtime in self.engines and (self.keeps_activation or runtime != "vllm" or not joined))

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        """Stored bytes of the group at `size` in other dtypes than that of the weights (orders, labels, rounded numbers with
        their scales)."""
        return 0

    def metric_of_error(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """(C, R) in which `Fit.error` is measured, for the objective `metric`."""
        return problem.columns(), problem.rows()

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """(bytes of memory, operations, bytes of the file) of a fit of the group in a metric with these needs, for forecasts."""
        m, n = sum(matrix.shape[0] for matrix in group), max(matrix.shape[1] for matrix in group)
        memory = 8.0 * (4 * m * n + 3 * n * n + 3 * min(m, n) ** 2)
        cached = 4.0 * sum(matrix.shape[0] * matrix.shape[1] for matrix in group)
        return memory, Operations(products=2.0 * m * n * n, decompositions=EIGEN * min(m, n) ** 3), cached

    def predicting(self, group: list[Matrix]) -> float:
        """Bytes of memory of `predicted` with its problem and its fit, for forecasts."""
        m, n = sum(matrix.shape[0] for matrix in group), max(matrix.shape[1] for matrix in group)
        return 8.0 * (2 * m * n + 2 * (m * m + n * n))

    def again(self, group: list[Matrix], needs: tuple[str, ...]) -> Operations:
        """Operations of `fit_at`, at the size at which it takes most, for forecasts."""
        return self.work(group, needs)[1]

    @abstractmethod
    def fit(self, problem: Problem, largest: int) -> Fit:
        """Fit the group once for every size up to `largest`."""

    def fit_at(self, problem: Problem, size: int) -> dict[str, Tensor]:
        """The tensors of `fit` from which `stored` makes one size: bit-identical, and perhaps others."""
        return self.fit(problem, self.largest(problem.group)).tensors

    def leaves_out(self, needs: tuple[str, ...]) -> bool:
        """Whether factors in a metric with these needs can do without tensors, as the fit is made again where they are read."""
        return self.predicts and "gram" in {*needs, *self.needs()} and self.clustering() is None

    def predicts_at_once(self, needs: tuple[str, ...]) -> bool:
        """Whether a fit in a metric with these needs reads all that its predicted losses need."""
        return self.predicts and {"gram", "gradient_gram"} <= {*needs, *self.needs()}

    def judged(self, group: list[Matrix]) -> list[Matrix]:
        """The matrices whose output gradients `predicted` needs."""
        return group

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        """(sizes + 1,): predicted increase of the loss in nats per token at every size of a fit, see `winnow.factors.predict`.
        The problem has the statistics `needs` and `gram`, and `gradient_gram` of `judged`, not necessarily those of the fit."""
        raise NotImplementedError(f"{self.kind()} does not predict losses")

    @abstractmethod
    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        """{module name: its part of the checkpoint} at `size`, without biases unless `bias_name` is None."""

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        """{module name: its layout} at `size`, as `stored` has them."""
        raise NotImplementedError(f"what {self.kind()} stores depends on its fit")

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        """The sizes whose time is measured, from which that of the others is interpolated linearly: by default `count` evenly
        spread ones. Empty if no size stores less than dense."""
        largest = self.largest(group)
        return sorted({1 + round(i * (largest - 1) / (count - 1)) for i in range(count)}) if largest else []

    def report(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Any] | None:
        """A report of the optimisation at `size`, for structures that are `optimised_at_size`: numbers, strings and lists."""
        return None

    @staticmethod
    @abstractmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        """An empty module of this layout that replaces `dense`; its tensors are those of `stored`, and the bias."""

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        """Tie tensors of the module `name` to those of the modules that store them: {name of the tensor: stored name}."""
        return {}


STRUCTURES: Registry[Structure] = Registry("winnow.structures", Structure, nested="AnyStructure")
