"""`per_type`: within each type of matrix, those that lose more keep more (SVD-LLM V2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.allocation.base import Allocation, AllocationOptions, Choice, losses, spend, stored_bytes
from winnow.allocation.kinds.uniform import by_share

if TYPE_CHECKING:
    from winnow.allocation.groups import Group

KEPT = 0.5  # of what all keep, at least


class PerType(Allocation):
    """Every type of matrix (q, k, ..., down) gives up the same share on average; within a type, matrix i gives up a share in
    proportion to 1 / ln L_i, with L_i the norm of the error, in the metric, at the uniform size. The logarithm depends on the
    unit of L, which in the paper is that of the activations, summed over its calibration tokens; here L is counted so that the
    smallest of a type is e^`smallest`. A matrix keeps at least half of the uniform share, since the formula can ask for all of
    one that loses next to nothing at the uniform size, and no more than its structure can store. Shares are scaled until the
    bytes are met."""

    version = 2
    reference = "SVD-LLM V2, arXiv 2503.12340"

    class Options(AllocationOptions):
        kind: Literal["per_type"]
        smallest: float = Field(
            8.0,
            gt=0,
            description="natural logarithm of the smallest loss of a type: the larger, the more alike are the shares. The "
            "paper's unit gives large models more than 8; docs/peers.md says more",
        )

    options: Options

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        removed = self._weights(groups, keep)
        allowed = keep * sum(g.dense for g in groups)

        def sizes_of(scale: float) -> dict[str, int | None]:
            kept = {name: max(KEPT * keep, 1 - scale * weight) for name, weight in removed.items()}
            return {**by_share(groups, kept, 0.0)}

        low, high = 0.0, 1.0 / min(removed.values())
        for _ in range(60):  # of the scale, between nothing removed and as much of every matrix as may be
            middle = (low + high) / 2
            low, high = (low, middle) if stored_bytes(groups, sizes_of(middle)) <= allowed else (middle, high)
        sizes = sizes_of(high)
        spend(groups, sizes, allowed, {g.name: losses(g, "relative") for g in groups})
        return Choice(sizes)

    def _weights(self, groups: list[Group], keep: float) -> dict[str, float]:
        """{group: its share of what is removed, 1 on average over its type}."""
        uniform = by_share(groups, {g.name: keep for g in groups}, keep)
        types: dict[str, dict[str, float]] = {}
        for g in groups:
            types.setdefault("+".join(m.role for m in g.matrices), {})[g.name] = g.error[uniform[g.name]]
        found: dict[str, float] = {}
        for squared in types.values():
            unit = min((value for value in squared.values() if value > 0), default=1.0)
            logs = {name: self.options.smallest + 0.5 * math.log(max(value, unit) / unit) for name, value in squared.items()}
            mean = sum(1 / value for value in logs.values()) / len(logs)
            found |= {name: 1 / value / mean for name, value in logs.items()}
        return found
