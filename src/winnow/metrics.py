"""Metrics: which error a fit minimises, || (W - W_k) C^{1/2} ||_F^2, as a choice of C from weights or statistics.

A metric returns C as a vector (its diagonal) or as a full matrix (n, n); the scale of C does not matter to the fit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor


class MetricOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str


class Metric(ABC):
    """C for a matrix W (m, n) whose inputs x have the statistics `site` (float64 tensors by name)."""

    version: ClassVar[int] = 1
    reference: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[MetricOptions]]

    def __init__(self, options: MetricOptions):
        self.options = options

    @classmethod
    def kind(cls) -> str:
        return get_args(cls.Options.model_fields["kind"].annotation)[0]

    @abstractmethod
    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        """C: (n,) if diagonal, (n, n) if full; float64, positive semi-definite."""


class Weights(Metric):
    """C = I: the error of the weights themselves."""

    reference = "Eckart and Young 1936"

    class Options(MetricOptions):
        kind: Literal["weights"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return weight.new_ones(weight.shape[1])


class WeightNorm(Metric):
    """C = diag(||W_j||^2): every column weighted by its own norm."""

    reference = "HyperTensor Paper VII (weight-norm proxy)"

    class Options(MetricOptions):
        kind: Literal["weight_norm"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return weight.square().sum(dim=0)


class MeanAbs(Metric):
    """C = diag(mean|x_j|^alpha)^2 (ASVD)."""

    reference = "ASVD, arXiv 2312.05821"
    needs = ("mean_abs",)

    class Options(MetricOptions):
        kind: Literal["mean_abs"]
        alpha: float = Field(0.5, gt=0, le=2, description="exponent of the mean absolute input")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["mean_abs"].pow(2 * self.options.alpha)  # type: ignore[attr-defined]


class MaxAbs(Metric):
    """C = diag(max|x_j|^alpha)^2: as ASVD, with the largest input of a channel."""

    reference = "ASVD, arXiv 2312.05821 (abs_max)"
    needs = ("max_abs",)

    class Options(MetricOptions):
        kind: Literal["max_abs"]
        alpha: float = Field(0.5, gt=0, le=2, description="exponent of the largest absolute input")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["max_abs"].pow(2 * self.options.alpha)  # type: ignore[attr-defined]


class SecondMoment(Metric):
    """C = diag(E[x_j^2]): the error of the outputs if channels were uncorrelated."""

    reference = "diagonal of the Gram metric"
    needs = ("rms",)

    class Options(MetricOptions):
        kind: Literal["second_moment"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["rms"].square()


class Gram(Metric):
    """C = E[x x^T]: the error of the outputs on the calibration tokens."""

    reference = "SVD-LLM, arXiv 2403.07378, solved as in Swift-SVD"
    needs = ("gram",)

    class Options(MetricOptions):
        kind: Literal["gram"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["gram"]


METRICS: dict[str, type[Metric]] = {cls.kind(): cls for cls in Metric.__subclasses__()}

if TYPE_CHECKING:
    AnyMetric = MetricOptions
else:  # a union of what is registered, which a type checker cannot see
    AnyMetric = Annotated[reduce(or_, (cls.Options for cls in METRICS.values())), Field(discriminator="kind")]


def metric_of(spec: dict) -> Metric:
    """The metric that a resolved specification ({kind, ...}) describes."""
    cls = METRICS[spec["kind"]]
    return cls(cls.Options.model_validate(spec))
