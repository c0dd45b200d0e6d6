from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from winnow.metrics.base import Metric, MetricOptions

if TYPE_CHECKING:
    from torch import Tensor


class SecondMoment(Metric):
    """C = diag(E[x_j^2]): the error of the outputs if channels were uncorrelated."""

    reference = "diagonal of the Gram metric"
    needs = ("rms",)

    class Options(MetricOptions):
        kind: Literal["second_moment"]

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return site["rms"].square()
