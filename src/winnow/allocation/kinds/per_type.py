"""`per_type`: within each type of matrix, matrices with a larger error keep more (SVD-LLM V2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.allocation.base import Allocation, AllocationOptions, Choice, losses, spend, stored_bytes
from winnow.allocation.kinds.uniform import by_share

if TYPE_CHECKING:
    from winnow.allocation.groups import Group

KEPT = 0.5  # smallest kept share, relative to the uniform one


class PerType(Allocation):
    """The same share is removed from every type of matrix (q, k, ..., down) on average; within a type, the removed share of
    matrix i is proportional to 1 / ln L_i, with L_i the norm of the error in the metric at the uniform size. The logarithm
    depends on the unit of L, in the paper that of activations summed over its calibration tokens; here L is scaled so that the
    smallest of a type is e^`smallest`. A matrix keeps at least half of the uniform share, since the formula could remove a matrix
    with almost no error at the uniform size, and at most what its structure can store. Shares are scaled to meet the bytes."""

    version = 2
    reference = "SVD-LLM V2, arXiv 2503.12340"

    class Options(AllocationOptions):
        kind: Literal["per_type"]
        smallest: float = Field(
            8.0,
            gt=0,
            description="natural logarithm of the smallest loss of a type; the larger, the more uniform the shares. The paper's "
            "unit corresponds to more than 8 for large models; see docs/peers.md",
        )

    options: Options

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        removed = self._weights(groups, keep)
        allowed = keep * sum(g.dense for g in groups)

        def sizes_of(scale: float) -> dict[str, int | None]:
            kept = {name: max(KEPT * keep, 1 - scale * weight) for name, weight in removed.items()}
            return {**by_share(groups, kept, 0.0)}

        low, high = 0.0, 1.0 / min(removed.values())
        for _ in range(60):  # bisection of the scale, between nothing removed and the maximum of every matrix
            middle = (low + high) / 2
            low, high = (low, middle) if stored_bytes(groups, sizes_of(middle)) <= allowed else (middle, high)
        sizes = sizes_of(high)
        spend(groups, sizes, allowed, {g.name: losses(g, "relative") for g in groups})
        return Choice(sizes)

    def _weights(self, groups: list[Group], keep: float) -> dict[str, float]:
        """{group: relative share to remove, 1 on average over its type}."""
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
