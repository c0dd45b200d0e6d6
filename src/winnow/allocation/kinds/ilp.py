"""`ilp`: an integer programme that chooses a size (or dense) for every group, and one of several structures."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from winnow.allocation.base import (
    Allocation,
    Choice,
    Predicting,
    counted_once,
    dense_bytes,
    losses,
    spend,
    stored_bytes,
)
from winnow.allocation.blocks import Place, Way, places_of, ways_of
from winnow.allocation.runtimes import restricted
from winnow.allocation.times import Timing
from winnow.errors import InputError
from winnow.structures.base import RUNTIMES, Runtime

if TYPE_CHECKING:
    from winnow.allocation.groups import Group

RUNTIME = "what is to run the compressed model as it is stored; other sizes are left out: " + "; ".join(
    f"`{name}`, {what}" for name, what in RUNTIMES.items()
)
DOUBLINGS, BISECTIONS = 30, 20  # steps in which the price of a second is found
DENSE = -1  # means "stays dense" in arrays of sizes


@dataclass(frozen=True)
class Options:
    """The options of one group: arrays of sizes (DENSE for dense), their bytes, losses and seconds (0 where none were measured),
    all of one length."""

    name: str
    sizes: np.ndarray
    bytes: np.ndarray
    losses: np.ndarray
    times: np.ndarray


class Blocks(NamedTuple):
    """The groups (by index) at every place, and the ways to store each block by places; see `winnow.allocation.blocks`."""

    at: dict[Place, list[int]]
    ways: list[list[Way]]


class IntegerProgramme(Allocation):
    """The lowest sum of losses within the bytes, with one option per group: evenly spread sizes, sizes around the Lagrangian's
    choice, or dense; for a structure with alternatives (`mixed`), also over the ways to store a block of matrices. With few
    sizes, as of rounded numbers, the optimum may use fewer bytes than the budget's tolerance allows; then it is the optimum among
    allocations within the tolerance, if there are any. With `time`, the measured time of the chosen forms is bounded as well,
    and `keep_bytes` is only an upper bound. allocation.json has the solver's status, the Lagrangian lower bound of the objective
    over all sizes, and the gap to it."""

    reference = "multiple-choice knapsack by CBC; ranks by integer programming as in LEMS"
    chooses = True
    libraries = ("pulp",)

    class Options(Predicting):
        kind: Literal["ilp"]  # type: ignore[assignment]
        sizes: int = Field(
            16, ge=2, description="number of evenly spread sizes per group that are offered, from 1 to the largest"
        )
        near: int = Field(4, ge=0, description="number of further sizes offered on each side of the Lagrangian's choice")
        gap: float = Field(1e-4, ge=0, le=0.1, description="relative gap at which the solver may stop")
        nodes: int = Field(
            10_000, ge=1, description="limit of nodes of the search tree, at which the solver stops with the best solution found"
        )
        runtime: Runtime = Field("any", description=RUNTIME)
        time: Timing | None = Field(
            None,
            description="bound on the time of the products with the chosen forms, which the job `time_forms` measures; see below",
        )

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        from winnow.allocation.groups import TOLERANCE  # which imports this package

        options: IntegerProgramme.Options = self.options  # type: ignore[assignment]
        began = time.monotonic()
        groups = restricted(sorted(groups, key=lambda g: g.name), options.runtime)
        costs = {g.name: losses(g, options.objective) for g in groups}
        allowed = keep * dense_bytes(groups)
        offering = alternatives(groups, options.leave_dense)
        blocks = Blocks(at := places_of(offering), ways_of(list(at)))
        every = [options_of(g, costs[g.name], options.leave_dense) for g in offering]
        least = pick(every, blocks, 0.0, 1.0)
        if least.bytes > allowed:
            return Choice(_sizes(every, least.chosen))
        dense_time = sum(g.dense_time for g in counted_once(groups))
        limit = options.time.keep * dense_time if options.time else math.inf
        fastest = pick(every, blocks, 0.0, 0.0, 1.0)
        if fastest.seconds > limit:
            raise InputError(
                f"`time.keep` {limit / dense_time:g} cannot be met: the fastest forms take {fastest.seconds / dense_time:.4f} of "
                "the time of the dense matrices; raise it, or add faster structures"
            )
        bound, picked = lagrangian_in_time(every, blocks, allowed, limit)
        offered = [_offer(o, index, options.sizes, options.near) for o, index in zip(every, picked.near, strict=True)]

        def solved(least: float) -> tuple[dict[str, int | None], str]:
            chosen, status = solve_programme(offered, blocks, least, allowed, options.gap, options.nodes, limit)
            sizes = _sizes(offered, chosen)
            if options.time is None:  # a larger size can take longer
                spend(groups, sizes, allowed, costs, losing=False)
            return sizes, status

        sizes, status = solved(0.0)
        lowest = allowed - TOLERANCE * dense_bytes(groups)
        if options.time is None and stored_bytes(groups, sizes) < lowest:
            with suppress(InputError):  # if nothing is within the tolerance, the caller reports the nearest
                sizes, status = solved(lowest)
        value = sum(costs[name][size] for name, size in sizes.items() if size is not None)
        facts: dict[str, Any] = {
            "status": status,
            "objective": options.objective,
            "value": value,
            "bound": bound,
            "gap": max(0.0, value - bound) / value if value > 0 else 0.0,
            "options": sum(len(o.sizes) for o in offered),
            "seconds": round(time.monotonic() - began, 3),
        }
        if options.time:
            seconds = sum(g.seconds(sizes[g.name]) for g in groups if g.name in sizes)
            facts["time"] = {"seconds": seconds, "dense_seconds": dense_time, "keep": seconds / dense_time}
        return Choice(sizes, facts)


class Picked(NamedTuple):
    """The cheapest choice at given prices: its cost, its bytes and seconds, the option of every chosen group (by index), and the
    best option of every group."""

    cost: float
    bytes: float
    seconds: float
    chosen: dict[int, int]
    near: list[int]


def alternatives(groups: list[Group], leave_dense: bool) -> list[Group]:
    """The groups to choose from. If there are alternatives, staying dense is a separate group without sizes, which is removed if
    matrices may not stay dense unless they have to."""
    sized = {m.name for g in groups if g.sizes() for m in g.matrices}
    return [g for g in groups if g.sizes() or leave_dense or not sized & {m.name for m in g.matrices}]


def options_of(g: Group, cost: list[float], leave_dense: bool) -> Options:
    """The sizes of a group, and dense; only dense if it has no sizes, which all store less."""
    sizes = g.sizes()
    dense = [DENSE] if leave_dense or not sizes else []
    return Options(
        g.name,
        np.array(sizes + dense),
        np.array([g.bytes(s) for s in sizes] + [g.dense] * len(dense), dtype=float),
        np.array([cost[s] for s in sizes] + [0.0] * len(dense), dtype=float),
        np.array([g.seconds(s) for s in sizes] + [g.seconds(None)] * len(dense), dtype=float),
    )


def pick(every: list[Options], blocks: Blocks, per_loss: float, per_byte: float, per_second: float = 0.0) -> Picked:
    """The options with the lowest sum of losses, bytes and seconds times their prices: for each block the minimum over the ways
    to store it of the sum over places of the minimum over groups and their options; the first, which is the smaller one, of equal
    ones."""
    near, costs = [], []
    for o in every:
        priced = per_loss * o.losses + per_byte * o.bytes
        if per_second:
            priced = priced + per_second * o.times
        near.append(int(priced.argmin()))
        costs.append(float(priced[near[-1]]))
    best = {place: min(at, key=costs.__getitem__) for place, at in blocks.at.items()}
    chosen: list[int] = []
    for ways in blocks.ways:
        way = ways[0] if len(ways) == 1 else min(ways, key=lambda way: sum(costs[best[place]] for place in way))
        chosen += [best[place] for place in way]
    total, seconds = (sum(float(getattr(every[g], key)[near[g]]) for g in chosen) for key in ("bytes", "times"))
    return Picked(sum(costs[g] for g in chosen), total, seconds, {g: near[g] for g in chosen}, near)


def lagrangian(every: list[Options], blocks: Blocks, allowed: float) -> tuple[float, Picked]:
    """(Lagrangian bound, choice at its multiplier): the maximum over u >= 0 of
    sum over blocks of min over their options of (loss + u bytes) - u allowed, which equals the bound of the linear relaxation. By
    bisection on u, as the bytes of the minimising options decrease with u. The returned choice fits into `allowed`."""
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


def lagrangian_in_time(every: list[Options], blocks: Blocks, allowed: float, limit: float) -> tuple[float, Picked]:
    """As `lagrangian`, with at most `limit` seconds: a price of a second is added to the losses, found by bisection. The bound is
    the highest that was found at any price, and holds at each."""
    bound, found = lagrangian(every, blocks, allowed)
    if found.seconds <= limit:
        return bound, found
    low, high = 0.0, sum(float(o.losses.max()) for o in every) / limit

    def at(price: float) -> Picked:
        nonlocal bound
        value, picked = lagrangian([replace(o, losses=o.losses + price * o.times) for o in every], blocks, allowed)
        bound = max(bound, value - price * limit)
        return picked

    for _ in range(DOUBLINGS):
        if (found := at(high)).seconds <= limit:
            break
        low, high = high, 4 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if (picked := at(middle)).seconds <= limit:
            high, found = middle, picked
        else:
            low = middle
    return bound, found


def _offer(every: Options, picked: int, spread: int, near: int) -> Options:
    """The options of a group that the programme may use: `spread` of all, `near` on each side of the picked one, the fastest, and
    dense."""
    last = len(every.sizes) - 1
    index = {picked, last, int(every.times.argmin()), *np.linspace(0, last, min(spread, last + 1)).round().astype(int).tolist()}
    index |= set(range(max(0, picked - near), min(last, picked + near) + 1))
    chosen = sorted(index)
    return Options(every.name, every.sizes[chosen], every.bytes[chosen], every.losses[chosen], every.times[chosen])


def solve_programme(
    offered: list[Options], blocks: Blocks, least: float, allowed: float, gap: float, nodes: int, limit: float = math.inf
) -> tuple[dict[int, int], str]:
    """({chosen group, by index: its option}, status) with the lowest sum of losses, `least` to `allowed` bytes and at most
    `limit` seconds, by CBC on one thread. Sums are scaled to about a thousand, so that its absolute tolerances are small.
    The limit is on nodes rather than time, so that results do not depend on the machine. Raises InputError if no solution is
    found within it."""
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
    if limit < math.inf:
        programme += total("times", 1e3 / limit) <= 1e3
    used: list[list[Any]] = []  # whether a way to store a block is chosen
    for number, ways in enumerate(blocks.ways):
        one = len(ways) == 1
        used.append([1] if one else [pulp.LpVariable(f"y_{number}_{w}", cat="Binary") for w in range(len(ways))])
        if not one:
            programme += pulp.lpSum(used[-1]) == 1
    for place, at in blocks.at.items():
        through = [u for us, ways in zip(used, blocks.ways, strict=True) for u, way in zip(us, ways, strict=True) if place in way]
        programme += pulp.lpSum(x for g in at for x in taken[g]) == pulp.lpSum(through)
    programme.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=gap, maxNodes=nodes, threads=1))
    if programme.sol_status == pulp.LpSolutionInfeasible:
        raise InputError("no forms keep both the bytes and the time; raise `keep_bytes` or `time.keep`, or set `nearest: true`")
    if programme.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise InputError(f"the integer programme found no allocation within {nodes} nodes; raise `nodes`, or use `greedy`")
    values = {(g, i): x.value() or 0.0 for g, xs in enumerate(taken) for i, x in enumerate(xs)}
    chosen: dict[int, int] = {}
    for us, ways in zip(used, blocks.ways, strict=True):
        way = ways[0] if len(ways) == 1 else ways[int(np.argmax([u.value() or 0.0 for u in us]))]
        for place in way:
            choices = [(g, i) for g in blocks.at[place] for i in range(len(taken[g]))]
            group, option = max(choices, key=values.__getitem__)
            chosen[group] = option
    while (over := sum(float(offered[g].bytes[i]) for g, i in chosen.items()) - allowed) > 0:
        chosen = _one_smaller(offered, chosen, over)  # the solver may exceed the limit by its tolerance
    return chosen, "optimal" if programme.sol_status == pulp.LpSolutionOptimal else "stopped at the node limit"


def _one_smaller(offered: list[Options], chosen: dict[int, int], over: float) -> dict[int, int]:
    """The options with one replaced by a smaller one that takes no longer: the cheapest that frees `over` bytes, or the one that
    frees most."""
    ways = []
    for g, i in chosen.items():
        o = offered[g]
        for j in np.flatnonzero((o.bytes < o.bytes[i]) & (o.times <= o.times[i])):
            freed = float(o.bytes[i] - o.bytes[j])
            ways.append((freed < over, float(o.losses[j] - o.losses[i]) if freed >= over else -freed, g, int(j)))
    if not ways:
        raise InputError("no smaller forms take as little time; raise `time.keep`, or lower `keep_bytes`")
    _, _, group, option = min(ways)
    return {**chosen, group: option}


def _sizes(options: list[Options], chosen: dict[int, int]) -> dict[str, int | None]:
    """{name: size, or None for dense} of the chosen groups."""
    picked = {options[g].name: options[g].sizes[i] for g, i in chosen.items()}
    return {name: None if size == DENSE else int(size) for name, size in picked.items()}
