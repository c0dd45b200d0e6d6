from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class TwoSided(Metric):
    """C = E[x x^T], R = E[g g^T] with g the gradient of the loss at the output: the loss to second order, assuming that x and g
    are independent (Kronecker-factored Fisher)."""

    reference = "KFAC, arXiv 1503.05671; as a metric for SVD in LEMS/KFAC-SVD"
    needs = ("gram", "gradient_gram")

    class Options(MetricOptions):
        kind: Literal["two_sided"]
        ridge: float = Field(1e-6, gt=0, le=1, description="added to R, as a share of its mean; raised if R is singular")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["gram"]

    def rows(self, output: dict[str, Tensor]) -> Tensor:
        from winnow.numerics.linalg import regularized

        ridge = self.options.ridge
        return regularized(output["gradient_gram"], ridge, "the second moment of the output's gradient")
