"""`uniform`: every matrix keeps the same share of its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from winnow.allocation.base import Allocation, AllocationOptions, Choice
from winnow.errors import InputError

if TYPE_CHECKING:
    from winnow.allocation.groups import Group


class Uniform(Allocation):
    """The same share of bytes for every group, rounded down; remaining bytes are spent one size step at a time on the groups that
    lost most by rounding (as a share of a step), as long as they fit."""

    reference = "the rule of most papers"

    class Options(AllocationOptions):
        kind: Literal["uniform"]

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        return Choice({**by_share(groups, {g.name: keep for g in groups}, keep)})


def by_share(groups: list[Group], shares: dict[str, float], keep: float) -> dict[str, int]:
    """Sizes by a share of bytes per group, rounded down; the remainder of `keep` of all bytes is spent as described in the
    class."""
    for g in groups:
        if g.largest < 1:
            raise InputError(
                f"{g.structure.kind()} of {g.describe()} stores more than dense at every size; lower what it always keeps"
            )
    dense = sum(g.dense for g in groups)
    sizes = {g.name: _largest_within(g, shares[g.name] * g.dense) for g in groups}
    left = keep * dense - sum(g.bytes(sizes[g.name]) for g in groups)

    def step(g: Group) -> int:
        return g.bytes(sizes[g.name] + 1) - g.bytes(sizes[g.name])

    def lost(g: Group) -> float:
        return (shares[g.name] * g.dense - g.bytes(sizes[g.name])) / max(1, step(g))

    growing = [g for g in groups if sizes[g.name] < g.largest]
    for g in sorted(growing, key=lambda g: (-lost(g), g.name)):
        if (more := step(g)) <= left:
            sizes[g.name] += 1
            left -= more
    return sizes


def _largest_within(g: Group, allowed: float) -> int:
    """The largest size of at least 1 with at most `allowed` bytes, by bisection (bytes increase with size)."""
    low, high = 1, max(1, g.largest)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if g.bytes(middle) <= allowed else (low, middle - 1)
    return low
