from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class Gram(Metric):
    """C = E[x x^T]: the error of the outputs on the calibration tokens. No ridge is needed: a singular C is solved exactly."""

    reference = "SVD-LLM, arXiv 2403.07378, solved as in Swift-SVD"
    needs = ("gram",)

    class Options(MetricOptions):
        kind: Literal["gram"]
        ridge: float = Field(0.0, ge=0, le=1, description="added to the diagonal of C, as a share of its mean")

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        gram, ridge = site["gram"], self.options.ridge
        if ridge == 0:
            return gram
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * gram.diagonal().mean())
        return shifted
