"""`ilp`: a multiple-choice knapsack, one size per group or dense, solved as an integer programme."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from winnow.allocations.base import (
    Allocation,
    Choice,
    Predicting,
    losses,
    smallest,
    spend,
    stored_bytes,
)
from winnow.errors import InputError

if TYPE_CHECKING:
    from winnow.allocation import Group

DENSE = -1  # the size that stands for "stays dense" in arrays of sizes


@dataclass(frozen=True)
class Options:
    """What one group can be: sizes (DENSE for dense), their bytes and their losses, arrays of one length."""

    name: str
    sizes: np.ndarray
    bytes: np.ndarray
    losses: np.ndarray


class IntegerProgramme(Allocation):
    """The least sum of losses within the bytes, over one option per group: a spread of sizes, those around the Lagrangian's
    choice, or dense. allocation.json tells the solver's status, the Lagrangian bound over all sizes (no allocation loses less,
    by the objective), and the gap to it."""

    reference = "multiple-choice knapsack by CBC; ranks by integer programming as in LEMS"
    libraries = ("pulp",)

    class Options(Predicting):
        kind: Literal["ilp"]  # type: ignore[assignment]
        sizes: int = Field(16, ge=2, description="sizes per group that are offered, from 1 to the largest, evenly spread")
        near: int = Field(4, ge=0, description="sizes offered beside, on either side of the Lagrangian's choice")
        gap: float = Field(1e-4, ge=0, le=0.1, description="relative gap at which the solver may stop")
        seconds: float = Field(
            60.0, gt=0, description="when the solver stops with the best it has; the choice then depends on the machine"
        )

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        options: IntegerProgramme.Options = self.options  # type: ignore[assignment]
        began = time.monotonic()
        groups = sorted(groups, key=lambda g: g.name)
        costs = {g.name: losses(g, options.objective) for g in groups}
        allowed = keep * sum(g.dense for g in groups)
        if stored_bytes(groups, smallest(groups)) > allowed:
            return Choice(smallest(groups))
        every = [options_of(g, costs[g.name], options.leave_dense) for g in groups]
        bound, picked = lagrangian(every, allowed)
        offered = [_offer(o, index, options.sizes, options.near) for o, index in zip(every, picked, strict=True)]
        chosen, status = solve(offered, allowed, options.gap, options.seconds)
        sizes = {o.name: None if o.sizes[i] == DENSE else int(o.sizes[i]) for o, i in zip(offered, chosen, strict=True)}
        spend(groups, sizes, allowed, costs)
        value = sum(costs[name][size] for name, size in sizes.items() if size is not None)
        facts = {
            "status": status,
            "objective": options.objective,
            "value": value,
            "bound": bound,
            "gap": max(0.0, value - bound) / value if value > 0 else 0.0,
            "options": sum(len(o.sizes) for o in offered),
            "seconds": round(time.monotonic() - began, 3),
        }
        return Choice(sizes, facts)


def options_of(g: Group, cost: list[float], leave_dense: bool) -> Options:
    """All sizes of a group, and dense. One that stores less than dense at no size has dense alone."""
    sizes = list(range(1, g.largest + 1))
    dense = [DENSE] if leave_dense or not sizes else []
    return Options(
        g.name,
        np.array(sizes + dense),
        np.array([g.bytes(s) for s in sizes] + [g.dense] * len(dense), dtype=float),
        np.array([cost[s] for s in sizes] + [0.0] * len(dense), dtype=float),
    )


def lagrangian(every: list[Options], allowed: float) -> tuple[float, list[int]]:
    """(the Lagrangian bound, each group's option at its multiplier): max over u >= 0 of
    sum over groups of min over options of (loss + u bytes) - u allowed, which equals the bound of the linear relaxation. By
    bisection on u, as the bytes of the minimising options fall with it. The options returned fit into `allowed`."""

    def picked(u: float) -> list[int]:
        return [int((o.losses + u * o.bytes).argmin()) for o in every]  # of equals, the first: the smaller

    def value(u: float) -> float:
        return sum(float((o.losses + u * o.bytes).min()) for o in every) - u * allowed

    def total(chosen: list[int]) -> float:
        return sum(float(o.bytes[i]) for o, i in zip(every, chosen, strict=True))

    if total(free := picked(0.0)) <= allowed:
        return float(value(0.0)), free
    spans = [o.losses.max() - o.losses.min() for o in every]
    steps = [np.diff(np.unique(o.bytes)).min() for o in every if len(o.bytes) > 1]
    low, high = 0.0, 2.0 * max(spans, default=1.0) / min(steps, default=1.0) + 1e-300
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if total(picked(middle)) <= allowed else (middle, high)
    return float(max(value(low), value(high))), picked(high)


def _offer(every: Options, picked: int, spread: int, near: int) -> Options:
    """The options that the programme gets of a group: `spread` of all, `near` on both sides of the picked one, and dense."""
    last = len(every.sizes) - 1
    index = {picked, last, *np.linspace(0, last, min(spread, last + 1)).round().astype(int).tolist()}
    index |= set(range(max(0, picked - near), min(last, picked + near) + 1))
    chosen = sorted(index)
    return Options(every.name, every.sizes[chosen], every.bytes[chosen], every.losses[chosen])


def solve(offered: list[Options], allowed: float, gap: float, seconds: float) -> tuple[list[int], str]:
    """(each group's option, status) of the least sum of losses within `allowed` bytes, by CBC on one thread. Both sums are
    scaled to about a thousand, where the solver's absolute tolerances are small. Raises InputError if it finds none in time."""
    import pulp

    scale = 1e3 / max(sum(float(np.median(o.losses)) for o in offered), 1e-300)
    weight = 1e3 / allowed
    programme = pulp.LpProblem("allocation", pulp.LpMinimize)
    taken = [[pulp.LpVariable(f"x_{g}_{i}", cat="Binary") for i in range(len(o.sizes))] for g, o in enumerate(offered)]

    def total(values: str, factor: float) -> pulp.LpAffineExpression:
        rows = zip(offered, taken, strict=True)
        return pulp.lpSum(x * float(v) * factor for o, xs in rows for x, v in zip(xs, getattr(o, values), strict=True))

    programme += total("losses", scale)
    programme += total("bytes", weight) <= 1e3
    for xs in taken:
        programme += pulp.lpSum(xs) == 1
    programme.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=seconds, threads=1))
    if programme.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise InputError(f"the integer programme found no allocation within {seconds} seconds; allow it more, or use `greedy`")
    chosen = [int(np.argmax([x.value() or 0.0 for x in xs])) for xs in taken]
    while (over := sum(float(o.bytes[i]) for o, i in zip(offered, chosen, strict=True)) - allowed) > 0:
        chosen = _one_smaller(offered, chosen, over)  # by the solver's tolerance
    return chosen, "optimal" if programme.sol_status == pulp.LpSolutionOptimal else "stopped at the time limit"


def _one_smaller(offered: list[Options], chosen: list[int], over: float) -> list[int]:
    """The options with one made the next smaller: the cheapest that frees `over` bytes, or the one that frees most."""
    ways = []
    for g, (o, i) in enumerate(zip(offered, chosen, strict=True)):
        for j in np.flatnonzero(o.bytes < o.bytes[i]):
            freed = float(o.bytes[i] - o.bytes[j])
            ways.append((freed < over, float(o.losses[j] - o.losses[i]) if freed >= over else -freed, g, int(j)))
    _, _, group, option = min(ways)
    return [option if g == group else i for g, i in enumerate(chosen)]
