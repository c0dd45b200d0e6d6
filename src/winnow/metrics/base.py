"""Metrics: the error that a fit minimises, || R^{1/2} (W - W_k) C^{1/2} ||_F^2, as a choice of C and R.

Both are computed from weights or statistics, as a vector (their diagonal) or a full matrix; their scale does not change the fit.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor


class MetricOptions(Options):
    pass


class Metric(Plugin):
    """C and R for a matrix W (m, n): `site` has statistics of its inputs, `output` those of the gradient of the loss at its
    outputs (float64 tensors by name)."""

    needs: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[MetricOptions]]

    @abstractmethod
    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        """C: (n,) if diagonal, (n, n) if full; float64, positive semi-definite."""

    def rows(self, output: dict[str, Tensor]) -> Tensor | None:
        """R: (m,) if diagonal, (m, m) if full; float64, positive definite. None for I."""
        return None


METRICS: Registry[Metric] = Registry("winnow.metrics", Metric)
