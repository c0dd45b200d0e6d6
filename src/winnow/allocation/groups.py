"""Budgets: from bytes, a rank or a share of rank to one size (or dense) per group of matrices."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.allocation.base import ALLOCATIONS, Choice, dense_bytes, stored_bytes
from winnow.errors import InputError
from winnow.io.artifacts import read_json
from winnow.io.records import AllocationRecord, GroupRecord, LearnedRecord
from winnow.models.architectures import Matrix, named_by, select
from winnow.models.files import ModelFiles, number_bytes, tensor_bytes
from winnow.structures.base import Structure

if TYPE_CHECKING:
    import pandas as pd

    from winnow.io import specs

log = logging.getLogger(__name__)
TOLERANCE = 0.005  # as a share of the dense bytes of the chosen matrices


@dataclass(frozen=True)
class Group:
    """A group of matrices with its byte counts: `unit` bytes per stored number, `fixed` bytes of biases."""

    name: str
    matrices: list[Matrix]
    structure: Structure
    unit: int
    fixed: int
    dense: int
    numbers: list[int]  # stored numbers at every size, up to the largest that stores less than dense
    error: list[float]  # error at every size
    predicted: list[float] | None = None  # increase of the loss at every size, nats per token; None if unknown
    times: list[float] | None = None  # measured seconds of a product at every size; None if unknown
    dense_time: float = 0.0  # the same of the dense matrices
    left_out: frozenset[int] = frozenset()  # sizes that may not be chosen

    def bytes(self, size: int | None) -> int:
        """Stored bytes at a size; None is dense."""
        if size is None:
            return self.dense
        return self.numbers[size] * self.unit + self.structure.index_bytes(self.matrices, size) + self.fixed

    def seconds(self, size: int | None) -> float:
        """Measured seconds of the products at a size, None is dense; 0 if they are unknown."""
        return self.dense_time if size is None or self.times is None else self.times[size]

    @property
    def largest(self) -> int:
        return len(self.numbers) - 1

    def sizes(self) -> list[int]:
        """The sizes that may be chosen, in ascending order."""
        return [size for size in range(1, len(self.numbers)) if size not in self.left_out]

    def offered(self) -> str:
        """The possible sizes, for error messages."""
        if self.largest == self.structure.limit(self.matrices):
            sizes = "only one size, `rank_fraction: 1`"
            if self.largest > 1:
                sizes = f"{self.largest} sizes, `rank: 1` to `rank: {self.largest}`"
            return f"{self.describe()} has {sizes}"
        return f"{self.describe()} can store rank 1 to {self.largest}, its break-even rank; choose a keep_bytes in between"

    def describe(self) -> str:
        m = self.matrices[0]
        return f"{m.module} ({m.shape[0]} x {m.shape[1]})"


def chosen_groups(
    files: ModelFiles, structure: Structure, targets: list[str], spectra: pd.DataFrame, predicted: pd.DataFrame | None = None
) -> list[Group]:
    """The groups of matrices named by `targets`, whole groups only; `spectra` (index: name of a fit) has the stored numbers of
    each, `predicted` (same index) the loss of every size, if the allocation needs it. For a structure with alternatives, a matrix
    is in several groups, and in one by itself whose only size is 0, which is dense."""
    chosen = {m.name: m for m in select(files.every, targets)}
    several, left, groups = len(structure.alternatives()) > 1, dict(chosen), []
    for name, own, matrices in structure.fits(files.every):
        if name not in spectra.index and matrices[0].expert is not None:
            for m in matrices:
                left.pop(m.name, None)
            continue  # too few tokens: it stays dense, and is not part of the budget
        inside = [m for m in matrices if m.name in chosen]
        if inside and len(inside) < len(matrices) and not several:
            raise InputError(
                f"{structure.kind()} fits {', '.join(m.role for m in matrices)} together; target all or none of them"
            )
        if inside and len(inside) == len(matrices):
            groups.append(_group(files, own, name, matrices, spectra, predicted))
            for m in matrices:
                left.pop(m.name, None)
    if left:
        missed = next(iter(left.values()))
        where = f"{missed.role} ({missed.module})"
        raise InputError(f"{structure.kind()} does not apply to {where}; remove it from the budget's targets")
    if several:
        alone = {m.name: m for g in groups for m in g.matrices}.values()
        groups = [g for g in groups if g.largest]
        groups += [Group(m.name, [m], structure, 0, 0, files.dense_bytes([m]), [0], [0.0], [0.0]) for m in alone]
    if not groups:
        raise InputError(f"every expert stays dense, and {', '.join(targets)} names nothing else; use more calibration tokens")
    return groups


def _group(
    files: ModelFiles, own: Structure, name: str, matrices: list[Matrix], spectra: pd.DataFrame, predicted: pd.DataFrame | None
) -> Group:
    record = files.tensors[f"{matrices[0].module}.weight"]
    unit = number_bytes(record["dtype"])
    counted = own.bias_name is None  # then its numbers include the biases
    fixed = 0 if counted else sum(tensor_bytes(files.tensors[f"{m.module}.bias"]) for m in matrices if m.bias)
    numbers, error = (np.asarray(spectra.at[name, key]).tolist() for key in ("numbers", "error"))
    known = predicted is not None and name in predicted.index
    loss = np.asarray(predicted.at[name, "predicted"]).tolist() if known else None  # type: ignore[union-attr]
    return Group(name, matrices, own, unit, fixed, files.dense_bytes(matrices), numbers, error, loss)


def experts_left_dense(files: ModelFiles, structure: Structure, targets: list[str], spectra: pd.DataFrame) -> list[str]:
    """The groups of experts named by `targets` that were not fitted, for lack of calibration tokens."""
    roles = {m.role for m in select(files.every, targets)}
    fits = [(name, g) for name, _, g in structure.fits(files.matrices) if g[0].expert is not None and g[0].role in roles]
    return list(dict.fromkeys(name.partition("@")[0] for name, _ in fits if name not in spectra.index))


def allocate(groups: list[Group], budget: specs.Budget) -> Choice:
    """A size (or dense) for every group, for a resolved budget (see `winnow.planning.config.Budget`); for alternative groups, for
    the chosen ones.

    Raises InputError, with the break-even size, if a size stores more than dense or if the bytes cannot be met.
    """
    named = [m.name for g in groups for m in g.matrices]
    if len(set(named)) < len(named) and not ALLOCATIONS.build(budget["allocation"]).chooses:
        raise InputError(
            f"{budget['allocation']['kind']} cannot choose between structures; use `keep_bytes` with the allocation `ilp`"
        )
    if budget["keep_bytes"] is not None:
        return _spread(groups, budget["keep_bytes"], budget["allocation"], budget.get("nearest", False))
    sizes: dict[str, int | None] = {}
    for g in groups:
        rank = of_target(g, budget["rank"])
        size = rank or max(1, round(of_target(g, budget["rank_fraction"]) * g.structure.whole(g.matrices)))
        if size > g.largest:
            if g.largest == g.structure.limit(g.matrices):
                raise InputError(f"rank {size} is not possible: {g.offered()}")
            raise InputError(
                f"rank {size} of {g.describe()} would store no less than the {g.dense:,} bytes of the dense matrix; use at most "
                f"its break-even rank, {g.largest}"
            )
        sizes[g.name] = size
    return Choice(sizes)


def learned_choice(path: str) -> Choice:
    """The sizes of a learned.json, and its record for allocation.json: held-out losses in nats of the initial and the learned
    sizes."""
    found = read_json(path)
    return Choice(found["sizes"], {key: found[key] for key in LearnedRecord.__annotations__})


def of_target(group: Group, ranks: Any) -> Any:
    """The `rank` or `rank_fraction` of a budget for a group: the value itself, or that of the group's target. Raises InputError
    if the group's matrices have different values."""
    if not isinstance(ranks, dict):
        return ranks
    found = {ranks[str(named_by(m.role, ranks))] for m in group.matrices}
    if len(found) > 1:
        raise InputError(
            f"{group.structure.kind()} fits {', '.join(m.role for m in group.matrices)} together; give them the same rank"
        )
    return found.pop()


def _spread(groups: list[Group], keep: float, allocation: dict[str, Any], nearest: bool) -> Choice:
    """The allocation's choice. Raises InputError if its bytes exceed the budget, or are lower by more than the tolerance, unless
    the `nearest` bytes are wanted or the time is bounded as well."""
    dense = dense_bytes(groups)
    spread = ALLOCATIONS.build(allocation)
    choice = spread.allocate(groups, keep)
    stored = stored_bytes(groups, choice.sizes)
    unused = keep * dense - stored
    if unused < -1e-6 or (unused > TOLERANCE * dense and not spread.timing()):
        found = (
            f"keep_bytes {keep}{spread.restriction()} cannot be met within {TOLERANCE:.1%}: the nearest is {stored / dense:.4f}"
        )
        if nearest:
            log.info("%s, which is stored", found)
            return choice
        chosen = [g for g in groups if g.name in choice.sizes]
        g = max([g for g in chosen if g.largest] or chosen, key=lambda g: keep * g.dense - g.bytes(choice.sizes[g.name]))
        raise InputError(f"{found}; {g.offered()}, or set `nearest: true` in the budget")
    return choice


def summarize(groups: list[Group], sizes: dict[str, int | None]) -> AllocationRecord:
    """The content of allocation.json: sizes (null: stays dense), bytes, the lost share of the objective in each group, and the
    predicted loss if known."""
    rows: list[GroupRecord] = []
    for g in (g for g in groups if g.name in sizes):
        size = sizes[g.name]
        lost = 0.0 if size is None or g.error[0] <= 0 else g.error[size] / g.error[0]
        row: GroupRecord = {
            "group": g.name,
            "size": size,
            "dense_bytes": g.dense,
            "stored_bytes": g.bytes(size),
            "relative_error": lost,
        }
        if g.predicted is not None:
            row["predicted"] = 0.0 if size is None else g.predicted[size]
        rows.append(row)
    dense, stored = sum(r["dense_bytes"] for r in rows), sum(r["stored_bytes"] for r in rows)
    keep = stored / dense
    if not all("predicted" in r for r in rows):
        return {"dense_bytes": dense, "stored_bytes": stored, "keep_bytes": keep, "groups": rows}
    predicted = sum(r["predicted"] for r in rows)
    return {"dense_bytes": dense, "stored_bytes": stored, "keep_bytes": keep, "predicted": predicted, "groups": rows}
