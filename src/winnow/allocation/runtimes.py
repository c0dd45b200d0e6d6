"""The restriction of an allocation to sizes that a runtime computes with as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from winnow.errors import InputError
from winnow.models.architectures import Matrix, select
from winnow.structures.base import RUNTIMES, Runtime, Structure

if TYPE_CHECKING:
    from winnow.allocation.groups import Group


def restricted(groups: Sequence[Group], runtime: Runtime) -> list[Group]:
    """The groups without the sizes that the runtime does not run. Raises InputError if a matrix that had sizes has none left."""
    if runtime == "any":
        return list(groups)
    found = []
    for g in groups:
        left_out = {size for size in g.sizes() if not g.structure.runs(g.matrices, size, runtime)}
        found.append(replace(g, left_out=g.left_out | left_out))
    _check([(g.matrices, bool(g.sizes()), bool(left.sizes())) for g, left in zip(groups, found, strict=True)], runtime)
    return found


def check_sizes(structure: Structure, matrices: list[Matrix], targets: list[str], runtime: Runtime) -> None:
    """Raise InputError if a target of `matrices` has no size that the runtime runs: before anything is fitted."""
    if runtime == "any":
        return
    chosen, rows = {m.name for m in select(matrices, targets)}, []
    for _, own, group in structure.fits(matrices):
        if all(m.name in chosen for m in group):
            largest = own.largest(group)
            runs = any(own.runs(group, size, runtime) for size in range(1, largest + 1))
            rows.append((group, largest > 0, runs))
    _check(rows, runtime)


def _check(rows: Iterable[tuple[list[Matrix], bool, bool]], runtime: Runtime) -> None:
    """Raise InputError for a matrix that has sizes, of which the runtime runs none; `rows`: (group, whether it has sizes, whether
    some of them are left)."""
    sized: dict[str, Matrix] = {}
    left: set[str] = set()
    for group, any_size, runs in rows:
        sized |= {m.name: m for m in group if any_size}
        left |= {m.name for m in group if runs}
    for name, m in sized.items():
        if name not in left:
            raise InputError(
                f"no size of {m.module} ({m.shape[0]} x {m.shape[1]}) is left with `runtime: {runtime}`, which runs "
                f"{RUNTIMES[runtime]}; add such a structure or other groups of `rounded` to the method, remove {m.role} from the "
                "budget's targets, or set another `runtime`"
            )
