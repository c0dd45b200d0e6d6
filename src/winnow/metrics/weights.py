from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class Weights(Metric):
    """C = I: the error of the weights themselves."""

    reference = "Eckart and Young 1936"

    class Options(MetricOptions):
        kind: Literal["weights"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return weight.new_ones(weight.shape[1])
