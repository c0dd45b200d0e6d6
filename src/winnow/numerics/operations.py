"""Floating-point operations by the rate at which a device does them, for forecasts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

EIGEN = 25  # operations of an eigendecomposition of (n, n), over n^3
CALL = 1.3e5  # operations that take as long as a short call of torch, on a core


@dataclass(frozen=True)
class Operations:
    """Operations of a job, each counted in one of these kinds. Where a step is no product of matrices, its number is that of the
    products that take as long on a core; see `winnow.planning.rates` for the rates."""

    half: float = 0.0  # of products of matrices in 16 bits
    products: float = 0.0  # of products in float32 and float64, and of passes over numbers
    decompositions: float = 0.0  # of eigendecompositions in float64
    calls: float = 0.0  # of short calls, one after the other, in which a device does next to nothing: CALL each

    @property
    def total(self) -> float:
        return self.half + self.products + self.decompositions + self.calls

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.half + other.half,
            self.products + other.products,
            self.decompositions + other.decompositions,
            self.calls + other.calls,
        )

    def __mul__(self, times: float) -> Operations:
        return Operations(times * self.half, times * self.products, times * self.decompositions, times * self.calls)

    def __lt__(self, other: Operations) -> bool:
        return self.total < other.total


NONE = Operations()
