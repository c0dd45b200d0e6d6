from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class WeightNorm(Metric):
    """C = diag(||W_j||^2): columns weighted by their own norms."""

    reference = "HyperTensor Paper VII (weight-norm proxy)"

    class Options(MetricOptions):
        kind: Literal["weight_norm"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return weight.square().sum(dim=0)
