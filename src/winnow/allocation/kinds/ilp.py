"""`ilp`: a multiple-choice knapsack, one size per group or dense, and one of several structures, as an integer programme."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from winnow.allocation.base import (
    Allocation,
    Choice,
    Predicting,
    dense_bytes,
    losses,
    spend,
    stored_bytes,
)
from winnow.allocation.blocks import Place, Way, places_of, ways_of
from winnow.errors import InputError

if TYPE_CHECKING:
    from winnow.allocation.groups import Group

DENSE = -1  # the size that stands for "stays dense" in arrays of sizes


@dataclass(frozen=True)
class Options:
    """What one group can be: sizes (DENSE for dense), their bytes and their losses, arrays of one length."""

    name: str
    sizes: np.ndarray
    bytes: np.ndarray
    losses: np.ndarray


class Blocks(NamedTuple):
    """Which groups (by index) stand at a place, and the ways to store each block by places; see `winnow.allocation.blocks`."""

    at: dict[Place, list[int]]
    ways: list[list[Way]]


class IntegerProgramme(Allocation):
    """The least sum of losses within the bytes, over one option per group: a spread of sizes, those around the Lagrangian's
    choice, or dense. Of a structure with alternatives (`mixed`), over the ways to store a block of matrices as well. Where sizes
    are few, as of rounded numbers, the least sum may leave more of the budget than its tolerance; then it is the least of what
    does not, if anything does not. allocation.json tells the solver's status, the Lagrangian bound over all sizes (no allocation
    loses less, by the objective), and the gap to it."""

    reference = "multiple-choice knapsack by CBC; ranks by integer programming as in LEMS"
    chooses = True
    libraries = ("pulp",)

    class Options(Predicting):
        kind: Literal["ilp"]  # type: ignore[assignment]
        sizes: int = Field(16, ge=2, description="sizes per group that are offered, from 1 to the largest, evenly spread")
        near: int = Field(4, ge=0, description="sizes offered beside, on either side of the Lagrangian's choice")
        gap: float = Field(1e-4, ge=0, le=0.1, description="relative gap at which the solver may stop")
        nodes: int = Field(10_000, ge=1, description="of its search tree, after which the solver stops with the best it has")

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        from winnow.allocation.groups import TOLERANCE  # which imports this package

        options: IntegerProgramme.Options = self.options  # type: ignore[assignment]
        began = time.monotonic()
        groups = sorted(groups, key=lambda g: g.name)
        costs = {g.name: losses(g, options.objective) for g in groups}
        allowed = keep * dense_bytes(groups)
        offering = alternatives(groups, options.leave_dense)
        blocks = Blocks(at := places_of(offering), ways_of(list(at)))
        every = [options_of(g, costs[g.name], options.leave_dense) for g in offering]
        least = pick(every, blocks, 0.0, 1.0)
        if least.bytes > allowed:
            return Choice(_sizes(every, least.chosen))
        bound, picked = lagrangian(every, blocks, allowed)
        offered = [_offer(o, index, options.sizes, options.near) for o, index in zip(every, picked.near, strict=True)]

        def solved(least: float) -> tuple[dict[str, int | None], str]:
            chosen, status = solve(offered, blocks, least, allowed, options.gap, options.nodes)
            sizes = _sizes(offered, chosen)
            spend(groups, sizes, allowed, costs)
            return sizes, status

        sizes, status = solved(0.0)
        lowest = allowed - TOLERANCE * dense_bytes(groups)
        if stored_bytes(groups, sizes) < lowest:
            with suppress(InputError):  # if nothing is within the tolerance, the caller refuses what is nearest
                sizes, status = solved(lowest)
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


class Picked(NamedTuple):
    """The cheapest of everything at some prices: its loss and bytes as one sum of costs, its bytes, the option of every group
    that is taken (by index), and of every group the option that would be, were it taken."""

    cost: float
    bytes: float
    chosen: dict[int, int]
    near: list[int]


def alternatives(groups: list[Group], leave_dense: bool) -> list[Group]:
    """The groups to choose from: where some are alternatives to each other, staying dense is one of its own, a group without
    sizes, and is left out if nothing may stay dense but what has to."""
    sized = {m.name for g in groups if g.largest for m in g.matrices}
    return [g for g in groups if g.largest or leave_dense or not sized & {m.name for m in g.matrices}]


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


def pick(every: list[Options], blocks: Blocks, per_loss: float, per_byte: float) -> Picked:
    """The options with the least sum of per_loss loss + per_byte bytes: in each block the least over ways to store it of the sum
    over places of the least over groups and their options; of equals the first: the smaller."""
    near, costs = [], []
    for o in every:
        priced = per_loss * o.losses + per_byte * o.bytes
        near.append(int(priced.argmin()))
        costs.append(float(priced[near[-1]]))
    best = {place: min(at, key=costs.__getitem__) for place, at in blocks.at.items()}
    chosen: list[int] = []
    for ways in blocks.ways:
        way = ways[0] if len(ways) == 1 else min(ways, key=lambda way: sum(costs[best[place]] for place in way))
        chosen += [best[place] for place in way]
    total = sum(float(every[g].bytes[near[g]]) for g in chosen)
    return Picked(sum(costs[g] for g in chosen), total, {g: near[g] for g in chosen}, near)


def lagrangian(every: list[Options], blocks: Blocks, allowed: float) -> tuple[float, Picked]:
    """(the Lagrangian bound, what is picked at its multiplier): max over u >= 0 of
    sum over blocks of min over what they can be of (loss + u bytes) - u allowed, which equals the bound of the linear relaxation.
    By bisection on u, as the bytes of the minimising options fall with it. What is returned fits into `allowed`."""
    free = pick(every, blocks, 1.0, 0.0)
    if free.bytes <= allowed:
        return free.cost, free
    spans = [o.losses.max() - o.losses.min() for o in every]
    steps = [np.diff(np.unique(o.bytes)).min() for o in every if len(o.bytes) > 1]
    low, high = 0.0, 2.0 * max(spans, default=1.0) / min(steps, default=1.0) + 1e-300
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if pick(every, blocks, 1.0, middle).bytes <= allowed else (middle, high)
    found = pick(every, blocks, 1.0, high)
    return float(max(pick(every, blocks, 1.0, u).cost - u * allowed for u in (low, high))), found


def _offer(every: Options, picked: int, spread: int, near: int) -> Options:
    """The options that the programme gets of a group: `spread` of all, `near` on both sides of the picked one, and dense."""
    last = len(every.sizes) - 1
    index = {picked, last, *np.linspace(0, last, min(spread, last + 1)).round().astype(int).tolist()}
    index |= set(range(max(0, picked - near), min(last, picked + near) + 1))
    chosen = sorted(index)
    return Options(every.name, every.sizes[chosen], every.bytes[chosen], every.losses[chosen])


def solve(
    offered: list[Options], blocks: Blocks, least: float, allowed: float, gap: float, nodes: int
) -> tuple[dict[int, int], str]:
    """({group that is taken, by index: its option}, status) of the least sum of losses in `least` to `allowed` bytes, by CBC
    on one thread. Both sums are scaled to about a thousand, where the solver's absolute tolerances are small. The limit is of
    nodes, not of time, with which a choice would depend on the machine. Raises InputError if it finds none within it."""
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
    if least > 0:
        programme += total("bytes", weight) >= least * weight
    used: list[list[Any]] = []  # whether a way to store a block is taken
    for number, ways in enumerate(blocks.ways):
        one = len(ways) == 1
        used.append([1] if one else [pulp.LpVariable(f"y_{number}_{w}", cat="Binary") for w in range(len(ways))])
        if not one:
            programme += pulp.lpSum(used[-1]) == 1
    for place, at in blocks.at.items():
        through = [u for us, ways in zip(used, blocks.ways, strict=True) for u, way in zip(us, ways, strict=True) if place in way]
        programme += pulp.lpSum(x for g in at for x in taken[g]) == pulp.lpSum(through)
    programme.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=gap, maxNodes=nodes, threads=1))
    if programme.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise InputError(f"the integer programme found no allocation within {nodes} nodes; allow it more, or use `greedy`")
    values = {(g, i): x.value() or 0.0 for g, xs in enumerate(taken) for i, x in enumerate(xs)}
    chosen: dict[int, int] = {}
    for us, ways in zip(used, blocks.ways, strict=True):
        way = ways[0] if len(ways) == 1 else ways[int(np.argmax([u.value() or 0.0 for u in us]))]
        for place in way:
            choices = [(g, i) for g in blocks.at[place] for i in range(len(taken[g]))]
            group, option = max(choices, key=values.__getitem__)
            chosen[group] = option
    while (over := sum(float(offered[g].bytes[i]) for g, i in chosen.items()) - allowed) > 0:
        chosen = _one_smaller(offered, chosen, over)  # by the solver's tolerance
    return chosen, "optimal" if programme.sol_status == pulp.LpSolutionOptimal else "stopped at the node limit"


def _one_smaller(offered: list[Options], chosen: dict[int, int], over: float) -> dict[int, int]:
    """The options with one made the next smaller: the cheapest that frees `over` bytes, or the one that frees most."""
    ways = []
    for g, i in chosen.items():
        o = offered[g]
        for j in np.flatnonzero(o.bytes < o.bytes[i]):
            freed = float(o.bytes[i] - o.bytes[j])
            ways.append((freed < over, float(o.losses[j] - o.losses[i]) if freed >= over else -freed, g, int(j)))
    _, _, group, option = min(ways)
    return {**chosen, group: option}


def _sizes(options: list[Options], chosen: dict[int, int]) -> dict[str, int | None]:
    """{name: size, or None for dense} of the groups that are taken."""
    picked = {options[g].name: options[g].sizes[i] for g, i in chosen.items()}
    return {name: None if size == DENSE else int(size) for name, size in picked.items()}
