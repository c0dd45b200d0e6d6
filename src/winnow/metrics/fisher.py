from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class Fisher(Metric):
    """R = diag(sum_j E[(dL/dW_ij)^2]): rows weighted by the diagonal Fisher information of their weights, one sample a window."""

    reference = "FWSVD, arXiv 2207.00112"
    needs = ("fisher",)

    class Options(MetricOptions):
        kind: Literal["fisher"]
        ridge: float = Field(1e-6, gt=0, le=1, description="added to R, as a share of its mean; raised if R is singular")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return weight.new_ones(weight.shape[1])

    def rows(self, output: dict[str, Tensor]) -> Tensor:
        from winnow.numerics.linalg import regularized

        return regularized(output["fisher"], self.options.ridge, "the Fisher information")
