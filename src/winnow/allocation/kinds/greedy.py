"""`greedy`: bytes are spent step by step on the matrix with the largest gain per byte."""

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
    """Starts with size 1 everywhere and always takes the step with the largest decrease of the objective per byte: for low rank,
    the largest squared singular value of all matrices. A step may go to any larger size, or to dense; steps that exceed the
    budget are skipped."""

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
    """The steps of a group from size 1 on: the lower convex hull of loss over bytes. (minus the decrease per byte, bytes, size or
    None for dense), sorted by the first entry."""
    points: list[tuple[int, float, int | None]] = [(g.bytes(s), cost[s], s) for s in range(1, g.largest + 1)]
    if leave_dense and points:
        points.append((g.dense, 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # more bytes without less loss
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), b[0] - a[0], b[2]) for a, b in pairwise(hull)]


def _slope(a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> float:
    """Slope from a to b in loss per byte; negative if the loss decreases."""
    return (b[1] - a[1]) / max(1, b[0] - a[0])
