"""Budgets: from bytes, a rank or a share of rank to one size per group of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.architectures import Matrix, group_name, select
from winnow.errors import InputError
from winnow.models import ModelFiles, tensor_bytes
from winnow.structures.base import Structure

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.005  # of the dense bytes of the chosen matrices


@dataclass(frozen=True)
class Group:
    """A group of matrices with its byte counts: `unit` bytes per stored number, `fixed` bytes of biases and indices."""

    name: str
    matrices: list[Matrix]
    structure: Structure
    unit: int
    fixed: int
    dense: int
    numbers: list[int]  # stored at every size, up to the largest that stores less than dense
    error: list[float]  # left at every size

    def bytes(self, size: int) -> int:
        return self.numbers[size] * self.unit + self.fixed

    @property
    def largest(self) -> int:
        return len(self.numbers) - 1

    def describe(self) -> str:
        m = self.matrices[0]
        return f"{m.module} ({m.shape[0]} x {m.shape[1]})"


def chosen_groups(files: ModelFiles, structure: Structure, targets: list[str], spectra: pd.DataFrame) -> list[Group]:
    """The groups of matrices that `targets` name, whole groups only; `spectra` (index: group) has what each stores."""
    chosen = {m.name: m for m in select(files.matrices, targets)}
    groups = []
    for matrices in structure.groups(files.matrices):
        if group_name(matrices) not in spectra.index and matrices[0].expert is not None:
            for m in matrices:
                chosen.pop(m.name, None)
            continue  # too few tokens: it stays dense, and counts in no budget
        inside = [chosen.pop(m.name) for m in matrices if m.name in chosen]
        if inside and len(inside) < len(matrices):
            raise InputError(
                f"{structure.kind()} fits {', '.join(m.role for m in matrices)} together; target all or none of them"
            )
        if inside:
            record = files.tensors[f"{matrices[0].module}.weight"]
            unit = tensor_bytes({"shape": [1], "dtype": record["dtype"]})
            own = structure.bias_name is None  # then its numbers count the biases
            fixed = 0 if own else sum(tensor_bytes(files.tensors[f"{m.module}.bias"]) for m in matrices if m.bias)
            fixed += structure.index_bytes(matrices)
            name = group_name(matrices)
            numbers, error = (np.asarray(spectra.at[name, key]).tolist() for key in ("numbers", "error"))
            groups.append(Group(name, matrices, structure, unit, fixed, files.dense_bytes(matrices), numbers, error))
    if chosen:
        left = next(iter(chosen.values()))
        raise InputError(f"{structure.kind()} does not apply to {left.role} ({left.module}); take it out of the budget's targets")
    if not groups:
        raise InputError(f"every expert stays dense, and {', '.join(targets)} names nothing else; calibrate on more tokens")
    return groups


def experts_left_dense(files: ModelFiles, structure: Structure, targets: list[str], spectra: pd.DataFrame) -> list[str]:
    """The groups of experts that `targets` name and that were not fitted, for want of calibration tokens."""
    roles = {m.role for m in select(files.matrices, targets)}
    groups = [g for g in structure.groups(files.matrices) if g[0].expert is not None and g[0].role in roles]
    return [name for name in map(group_name, groups) if name not in spectra.index]


def allocate(groups: list[Group], budget: dict[str, Any]) -> dict[str, int]:
    """{group name: size} for a resolved budget (see `winnow.config.Budget`).

    Raises InputError, with the break-even size, for a size that stores more than dense and for bytes that cannot be met.
    """
    if budget["keep_bytes"] is not None:
        return uniform(groups, budget["keep_bytes"])
    sizes = {}
    for g in groups:
        size = budget["rank"] or max(1, round(budget["rank_fraction"] * g.structure.whole(g.matrices)))
        if size > g.largest:
            raise InputError(
                f"rank {size} of {g.describe()} would store no less than dense, which stores {g.dense:,} bytes; "
                f"its break-even rank is {g.largest}: ask for no more than that"
            )
        sizes[g.name] = size
    return sizes


def uniform(groups: list[Group], keep: float) -> dict[str, int]:
    """The same share of bytes for every group, rounded down; what rounding leaves is spent one size step at a time, on
    the groups that rounding took most from (as a share of a step), as long as it fits. Deterministic."""
    for g in groups:
        if g.largest < 1:
            raise InputError(
                f"{g.structure.kind()} of {g.describe()} stores more than dense at every size; lower what it always keeps"
            )
    dense = sum(g.dense for g in groups)
    sizes = {g.name: _largest_within(g, keep * g.dense) for g in groups}
    left = keep * dense - sum(g.bytes(sizes[g.name]) for g in groups)

    def step(g: Group) -> int:
        return g.bytes(sizes[g.name] + 1) - g.bytes(sizes[g.name])

    def lost(g: Group) -> float:
        return (keep * g.dense - g.bytes(sizes[g.name])) / max(1, step(g))

    growing = [g for g in groups if sizes[g.name] < g.largest]
    for g in sorted(growing, key=lambda g: (-lost(g), g.name)):
        if (more := step(g)) <= left:
            sizes[g.name] += 1
            left -= more
    if abs(left) > TOLERANCE * dense:
        stored = keep * dense - left
        g = max(groups, key=lambda g: keep * g.dense - g.bytes(sizes[g.name]))
        raise InputError(
            f"keep_bytes {keep} cannot be met within {TOLERANCE:.1%}: the nearest is {stored / dense:.4f}; "
            f"{g.describe()} can store rank 1 to {g.largest}, its break-even rank; choose a keep_bytes in between"
        )
    return sizes


def _largest_within(g: Group, allowed: float) -> int:
    """The largest size of at least 1 whose bytes stay within `allowed`, by bisection (bytes grow with size)."""
    low, high = 1, max(1, g.largest)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if g.bytes(middle) <= allowed else (low, middle - 1)
    return low


def summarize(groups: list[Group], sizes: dict[str, int]) -> dict[str, Any]:
    """What allocation.json holds: sizes, bytes, and the share of the objective that is lost in each group."""
    rows: list[dict[str, Any]] = []
    for g in groups:
        size = sizes[g.name]
        lost = g.error[size] / g.error[0] if g.error[0] > 0 else 0.0
        rows.append(
            {"group": g.name, "size": size, "dense_bytes": g.dense, "stored_bytes": g.bytes(size), "relative_error": lost}
        )
    dense, stored = (sum(r[k] for r in rows) for k in ("dense_bytes", "stored_bytes"))
    return {"dense_bytes": dense, "stored_bytes": stored, "keep_bytes": stored / dense, "groups": rows}
