from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class MaxAbs(Metric):
    """C = diag(max|x_j|^alpha)^2: ASVD with the largest absolute input of a channel."""

    reference = "ASVD, arXiv 2312.05821 (abs_max)"
    needs = ("max_abs",)

    class Options(MetricOptions):
        kind: Literal["max_abs"]
        alpha: float = Field(0.5, gt=0, le=2, description="exponent of the largest absolute input")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["max_abs"].pow(2 * self.options.alpha)
