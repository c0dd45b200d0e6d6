"""Blocks of alternative groups of matrices, of which an allocation chooses some such that every matrix is stored once.

A place is a set of matrices; the groups at a place are alternatives, one of which is chosen if the place is used. A way to store
a block is a list of disjoint places that cover the block: for an FFN, the whole FFN, or its matrices one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow.allocation.groups import Group

Place = frozenset[str]  # names of matrices
Way = tuple[Place, ...]


def places_of(groups: Sequence[Group]) -> dict[Place, list[int]]:
    """{place: indices of the groups at it}"""
    found: dict[Place, list[int]] = {}
    for index, g in enumerate(groups):
        found.setdefault(frozenset(m.name for m in g.matrices), []).append(index)
    return found


def ways_of(places: Sequence[Place]) -> list[list[Way]]:
    """The ways to store each block; blocks are the smallest sets of matrices such that no place crosses two. Ways are exact
    covers, so a block should have few places, as within a layer."""
    blocks: list[tuple[set[str], list[Place]]] = []
    for place in places:
        joined = [block for block in blocks if block[0] & place]
        blocks = [block for block in blocks if not block[0] & place]
        matrices = set(place).union(*(block[0] for block in joined))
        blocks.append((matrices, [*(p for block in joined for p in block[1]), place]))
    return [list(_covers(matrices, inside)) for matrices, inside in blocks]


def _covers(matrices: set[str], places: list[Place]) -> Iterator[Way]:
    if not matrices:
        yield ()
        return
    first = min(matrices)
    for place in places:
        if first in place and place <= matrices:
            yield from ((place, *rest) for rest in _covers(matrices - place, places))
