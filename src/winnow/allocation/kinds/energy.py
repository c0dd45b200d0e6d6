"""`energy`: keeps the same share of the objective in every matrix."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.allocation.base import LEAVE_DENSE, Allocation, AllocationOptions, Choice, losses, spend, stored_bytes

if TYPE_CHECKING:
    from winnow.allocation.groups import Group


class Energy(Allocation):
    """Every matrix has the smallest size whose error is at most a common share of the method's objective, the lowest share that
    the bytes allow. A matrix whose structure cannot reach it stays dense, or has its largest size."""

    reference = "energy threshold, e.g. k95 of principal components"

    class Options(AllocationOptions):
        kind: Literal["energy"]
        leave_dense: bool = Field(True, description=LEAVE_DENSE)

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        allowed = keep * sum(g.dense for g in groups)
        costs = {g.name: losses(g, "relative") for g in groups}
        shares = sorted({0.0, *(share for cost in costs.values() for share in cost)})

        def sizes_of(share: float) -> dict[str, int | None]:
            return {g.name: self._size(g, costs[g.name], share) for g in groups}

        low, high = 0, len(shares) - 1  # the lowest share whose sizes fit; the highest always fits, if any does
        while low < high:
            middle = (low + high) // 2
            fits = stored_bytes(groups, sizes_of(shares[middle])) <= allowed
            low, high = (low, middle) if fits else (middle + 1, high)
        sizes = sizes_of(shares[low])
        spend(groups, sizes, allowed, costs)
        return Choice(sizes, {"share_lost": shares[low]})

    def _size(self, g: Group, cost: list[float], share: float) -> int | None:
        size = bisect_left(cost, -share, lo=min(1, g.largest), key=lambda lost: -lost)  # the first with cost <= share
        if size <= g.largest and g.largest:
            return size
        return None if self.options.leave_dense or not g.largest else g.largest  # type: ignore[attr-defined]
