"""`per_type`: within each type of matrix, those that lose more keep more (SVD-LLM V2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from winnow.allocations.base import Allocation, AllocationOptions, Choice, losses, spend, stored_bytes
from winnow.allocations.uniform import by_share

if TYPE_CHECKING:
    from winnow.allocation import Group


class PerType(Allocation):
    """Every type of matrix (q, k, ..., down) gives up the same share on average; within a type, matrix i gives up a share in
    proportion to 1 / log L_i, with L_i what it loses in the metric at the uniform size. As the logarithm depends on the unit of
    L, which the paper leaves open, L is counted in 1/e of the smallest loss of the type. Shares are scaled until the bytes are
    met, and a matrix keeps no more than its structure can store."""

    reference = "SVD-LLM V2, arXiv 2503.12340"

    class Options(AllocationOptions):
        kind: Literal["per_type"]

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        removed = self._weights(groups, keep)
        allowed = keep * sum(g.dense for g in groups)

        def sizes_of(scale: float) -> dict[str, int | None]:
            return {**by_share(groups, {name: max(0.0, 1 - scale * weight) for name, weight in removed.items()}, 0.0)}

        low, high = 0.0, 1.0 / min(removed.values())
        for _ in range(60):  # of the scale, between nothing and all of every matrix removed
            middle = (low + high) / 2
            low, high = (low, middle) if stored_bytes(groups, sizes_of(middle)) <= allowed else (middle, high)
        sizes = sizes_of(high)
        spend(groups, sizes, allowed, {g.name: losses(g, "relative") for g in groups})
        return Choice(sizes)

    @staticmethod
    def _weights(groups: list[Group], keep: float) -> dict[str, float]:
        """{group: its share of what is removed, 1 on average over its type}."""
        uniform = by_share(groups, {g.name: keep for g in groups}, keep)
        types: dict[str, dict[str, float]] = {}
        for g in groups:
            types.setdefault("+".join(m.role for m in g.matrices), {})[g.name] = g.error[uniform[g.name]]
        found: dict[str, float] = {}
        for lost in types.values():
            unit = min((value for value in lost.values() if value > 0), default=1.0)
            weights = {name: 1 / (1 + math.log(max(value, unit) / unit)) for name, value in lost.items()}
            mean = sum(weights.values()) / len(weights)
            found |= {name: weight / mean for name, weight in weights.items()}
        return found
