"""`greedy`: bytes go, step by step, to the matrix where they gain most."""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.allocation.base import (
    OBJECTIVE,
    Allocation,
    Choice,
    Objective,
    Predicting,
    losses,
    smallest,
    spend,
    stored_bytes,
)

if TYPE_CHECKING:
    from winnow.allocation.groups import Group


class Greedy(Allocation):
    """From size 1 everywhere, always the step with the largest drop of the objective per byte: for low rank, the largest squared
    singular value of all matrices. A step is to whichever size (or to dense) drops fastest; one that no longer fits is passed
    over."""

    reference = "global heap of singular values, as in ZS-SVD and Dobi-SVD's start"

    class Options(Predicting):
        kind: Literal["greedy"]  # type: ignore[assignment]
        objective: Objective = Field("metric", description=OBJECTIVE)

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        options: Greedy.Options = self.options  # type: ignore[assignment]
        costs = {g.name: losses(g, options.objective) for g in groups}
        allowed = keep * sum(g.dense for g in groups)
        sizes = smallest(groups)
        left = allowed - stored_bytes(groups, sizes)
        hulls = {g.name: _hull(g, costs[g.name], options.leave_dense) for g in groups}
        heap = [(*hull[0][:1], name, 0) for name, hull in hulls.items() if hull]
        heapq.heapify(heap)
        while heap:
            _, name, index = heapq.heappop(heap)
            _, more, size = hulls[name][index]
            if more > left:
                continue
            sizes[name], left = size, left - more
            if index + 1 < len(hulls[name]):
                heapq.heappush(heap, (hulls[name][index + 1][0], name, index + 1))
        spend(groups, sizes, allowed, costs)
        return Choice(sizes)


def _hull(g: Group, cost: list[float], leave_dense: bool) -> list[tuple[float, int, int | None]]:
    """The steps of a group from size 1 on, each the one that drops fastest from where the last ended: the lower convex hull of
    loss over bytes. (minus the drop per byte, bytes, size or None for dense), of growing first entry."""
    points: list[tuple[int, float, int | None]] = [(g.bytes(s), cost[s], s) for s in range(1, g.largest + 1)]
    if leave_dense and points:
        points.append((g.dense, 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # more bytes and no less loss
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), b[0] - a[0], b[2]) for a, b in pairwise(hull)]


def _slope(a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> float:
    """Loss per byte from a to b; negative where it falls."""
    return (b[1] - a[1]) / max(1, b[0] - a[0])
