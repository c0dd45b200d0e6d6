"""The interface of a structure: what is stored instead of one or several matrices, at every size.

Files of this package are read when a workflow is planned, so torch is imported inside functions only.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict

from winnow.architectures import Matrix

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.metrics import Metric


METHOD, FORMAT_VERSION = "winnow", 1  # `quant_method` and version of the checkpoints that hold these structures


class StructureOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str


if TYPE_CHECKING:
    AnyStructure = StructureOptions
else:  # the options of any structure: known when all files of the package are read
    AnyStructure = typing.ForwardRef("AnyStructure")


@dataclass(frozen=True)
class Problem:
    """What a group of matrices is fitted on, all float64: W (out, in) and the statistics of its input, by matrix name."""

    group: list[Matrix]
    weights: dict[str, Tensor]
    sites: dict[str, dict[str, Tensor]]
    metric: Metric
    precision: float = 2.0**-52  # relative rounding error of the statistics

    metric_weights: dict[str, Tensor] | None = None  # what the metric looks at, where it is not `weights`

    def columns(self) -> Tensor:
        """The metric C of the group: the mean over its matrices, since a shared factor serves all of them."""
        weights = self.metric_weights or self.weights
        parts = [self.metric.columns(weights[m.name], self.sites.get(m.name, {})) for m in self.group]
        return sum(parts[1:], start=parts[0]) / len(parts)


@dataclass(frozen=True)
class Fit:
    """Every size at once: tensors whose leading directions are a smaller fit, and the squared error left at each size.

    `error[s]` is the error of size s in the fit's own metric (length: largest size + 1); `error[0]` is that of what is
    stored at every size (usually nothing). `spectrum` holds the singular values in that metric.
    """

    tensors: dict[str, Tensor]
    error: Tensor
    spectrum: Tensor


class Structure(ABC):
    """One way to store matrices. A size is the integer that a budget buys (for low rank: the rank)."""

    version: ClassVar[int] = 1
    reference: ClassVar[str]
    stores: ClassVar[str]  # for tables of methods: the stored tensors and their count
    bias_name: ClassVar[str]  # where the module keeps the bias of the matrix that it replaces
    Options: ClassVar[type[StructureOptions]]

    def __init__(self, options: StructureOptions):
        self.options = options

    @classmethod
    def kind(cls) -> str:
        return get_args(cls.Options.model_fields["kind"].annotation)[0]

    def needs(self) -> tuple[str, ...]:
        """Statistics that the structure needs besides those of the method's metric."""
        return ()

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        """Which matrices are fitted together; by default every matrix alone."""
        return [[m] for m in matrices]

    @abstractmethod
    def largest(self, group: list[Matrix]) -> int:
        """The largest size that stores less than the dense matrices (their break-even size)."""

    @abstractmethod
    def numbers(self, group: list[Matrix], size: int) -> int:
        """How many numbers the group stores at `size`, biases not counted."""

    def index_bytes(self, group: list[Matrix]) -> int:
        """Bytes of stored integers (orders, labels), which are of another dtype than the weights."""
        return 0

    @abstractmethod
    def fit(self, problem: Problem, largest: int) -> Fit:
        """Fit the group once for every size up to `largest`."""

    @abstractmethod
    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, dict[str, Tensor]]:
        """{module name: {tensor name below the module: tensor}} of the checkpoint at `size`, biases left out."""

    @abstractmethod
    def layout(self, group: list[Matrix], matrix: Matrix, size: int) -> dict[str, Any]:
        """What the checkpoint's config.json says of one module: enough to build it empty."""

    @staticmethod
    @abstractmethod
    def module(layout: dict[str, Any], bias: bool) -> nn.Module:
        """An empty module of this layout; its tensors are those of `stored`, and `bias_name` if it has a bias."""

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        """Make the module `name` use tensors that another module stores: {name of the tensor: name where it is stored}."""
        return {}
