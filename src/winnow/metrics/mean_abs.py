from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class MeanAbs(Metric):
    """C = diag(mean|x_j|^alpha)^2 (ASVD)."""

    reference = "ASVD, arXiv 2312.05821"
    needs = ("mean_abs",)

    class Options(MetricOptions):
        kind: Literal["mean_abs"]
        alpha: float = Field(0.5, gt=0, le=2, description="exponent of the mean absolute input")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["mean_abs"].pow(2 * self.options.alpha)
