"""Metrics: which error a fit minimises, || R^{1/2} (W - W_k) C^{1/2} ||_F^2, as a choice of C and R.

Both come from weights or statistics, as a vector (their diagonal) or as a full matrix; their scale does not matter to the fit.
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
    """C and R for a matrix W (m, n): `site` holds statistics of its inputs, `output` of the loss's gradient in its outputs
    (float64 tensors by name)."""

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

    def rows(self, output: dict[str, Tensor]) -> Tensor | None:
        """R: (m,) if diagonal, (m, m) if full; float64, positive definite. None for I."""
        return None


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
    """C = E[x x^T]: the error of the outputs on the calibration tokens. No ridge is needed: a singular C is solved exactly."""

    reference = "SVD-LLM, arXiv 2403.07378, solved as in Swift-SVD"
    needs = ("gram",)

    class Options(MetricOptions):
        kind: Literal["gram"]
        ridge: float = Field(0.0, ge=0, le=1, description="added to the diagonal of C, as a share of its mean")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return _with_ridge(site["gram"], self.options.ridge)  # type: ignore[attr-defined]


class Fisher(Metric):
    """R = diag(sum_j E[(dL/dW_ij)^2]): rows weighted by the diagonal Fisher information of their weights, windows as samples."""

    reference = "FWSVD, arXiv 2207.00112"
    needs = ("fisher",)

    class Options(MetricOptions):
        kind: Literal["fisher"]
        ridge: float = Field(1e-6, gt=0, le=1, description="added to R, as a share of its mean; raised where R is singular")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return weight.new_ones(weight.shape[1])

    def rows(self, output: dict[str, Tensor]) -> Tensor:
        from winnow.linalg import regularized

        return regularized(output["fisher"], self.options.ridge, "the Fisher information")  # type: ignore[attr-defined]


class TwoSided(Metric):
    """C = E[x x^T], R = E[g g^T] with g the gradient of the loss in the output: the loss to second order, with the two taken
    as independent (Kronecker-factored Fisher)."""

    reference = "KFAC, arXiv 1503.05671; as a metric for SVD in LEMS/KFAC-SVD"
    needs = ("gram", "gradient_gram")

    class Options(MetricOptions):
        kind: Literal["two_sided"]
        ridge: float = Field(1e-6, gt=0, le=1, description="added to R, as a share of its mean; raised where R is singular")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["gram"]

    def rows(self, output: dict[str, Tensor]) -> Tensor:
        from winnow.linalg import regularized

        ridge = self.options.ridge  # type: ignore[attr-defined]
        return regularized(output["gradient_gram"], ridge, "the second moment of the output's gradient")


def _with_ridge(gram: Tensor, ridge: float) -> Tensor:
    if ridge == 0:
        return gram
    shifted = gram.clone()
    shifted.diagonal().add_(ridge * gram.diagonal().mean())
    return shifted


METRICS: dict[str, type[Metric]] = {cls.kind(): cls for cls in Metric.__subclasses__()}

if TYPE_CHECKING:
    AnyMetric = MetricOptions
else:  # a union of what is registered, which a type checker cannot see
    AnyMetric = Annotated[reduce(or_, (cls.Options for cls in METRICS.values())), Field(discriminator="kind")]


def metric_of(spec: dict) -> Metric:
    """The metric that a resolved specification ({kind, ...}) describes."""
    cls = METRICS[spec["kind"]]
    return cls(cls.Options.model_validate(spec))
