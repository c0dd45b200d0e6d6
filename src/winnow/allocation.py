"""Budgets: from bytes, a rank or a share of rank to one size per group of matrices, or to leaving it dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.allocations import allocation_of
from winnow.allocations.base import Choice
from winnow.architectures import Matrix, group_name, named_by, select
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
    predicted: list[float] | None = None  # increase of the loss at every size, nats per token; None where it is not known

    def bytes(self, size: int | None) -> int:
        """Stored bytes at a size; None is dense."""
        if size is None:
            return self.dense
        return self.numbers[size] * self.unit + self.fixed

    @property
    def largest(self) -> int:
        return len(self.numbers) - 1

    def describe(self) -> str:
        m = self.matrices[0]
        return f"{m.module} ({m.shape[0]} x {m.shape[1]})"


def chosen_groups(
    files: ModelFiles, structure: Structure, targets: list[str], spectra: pd.DataFrame, predicted: pd.DataFrame | None = None
) -> list[Group]:
    """The groups of matrices that `targets` name, whole groups only; `spectra` (index: group) has what each stores, `predicted`
    (likewise) the loss of every size, where the allocation asks for it."""
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
            known = predicted is not None and name in predicted.index
            loss = np.asarray(predicted.at[name, "predicted"]).tolist() if known else None  # type: ignore[union-attr]
            groups.append(Group(name, matrices, structure, unit, fixed, files.dense_bytes(matrices), numbers, error, loss))
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


def allocate(groups: list[Group], budget: dict[str, Any]) -> Choice:
    """A size for every group, or dense, for a resolved budget (see `winnow.config.Budget`).

    Raises InputError, with the break-even size, for a size that stores more than dense and for bytes that cannot be met.
    """
    if budget["keep_bytes"] is not None:
        return _spread(groups, budget["keep_bytes"], budget["allocation"])
    sizes: dict[str, int | None] = {}
    for g in groups:
        rank = of_target(g, budget["rank"])
        size = rank or max(1, round(of_target(g, budget["rank_fraction"]) * g.structure.whole(g.matrices)))
        if size > g.largest:
            raise InputError(
                f"rank {size} of {g.describe()} would store no less than dense, which stores {g.dense:,} bytes; "
                f"its break-even rank is {g.largest}: ask for no more than that"
            )
        sizes[g.name] = size
    return Choice(sizes)


def of_target(group: Group, ranks: Any) -> Any:
    """What a budget's `rank` or `rank_fraction` says of a group: the value itself, or that of the target that names the group.
    Raises InputError where the group's matrices have different ones."""
    if not isinstance(ranks, dict):
        return ranks
    found = {ranks[str(named_by(m.role, ranks))] for m in group.matrices}
    if len(found) > 1:
        raise InputError(
            f"{group.structure.kind()} fits {', '.join(m.role for m in group.matrices)} together; give them the same rank"
        )
    return found.pop()


def _spread(groups: list[Group], keep: float, allocation: dict[str, Any]) -> Choice:
    """The allocation's choice; refused if its bytes are over the budget, or under it by more than the tolerance."""
    dense = sum(g.dense for g in groups)
    choice = allocation_of(allocation).allocate(groups, keep)
    stored = sum(g.bytes(choice.sizes[g.name]) for g in groups)
    if stored > keep * dense + 1e-6 or keep * dense - stored > TOLERANCE * dense:
        g = max(groups, key=lambda g: keep * g.dense - g.bytes(choice.sizes[g.name]))
        raise InputError(
            f"keep_bytes {keep} cannot be met within {TOLERANCE:.1%}: the nearest is {stored / dense:.4f}; "
            f"{g.describe()} can store rank 1 to {g.largest}, its break-even rank; choose a keep_bytes in between"
        )
    return choice


def summarize(groups: list[Group], sizes: dict[str, int | None]) -> dict[str, Any]:
    """What allocation.json holds: sizes (null: stays dense), bytes, the share of the objective that is lost in each group, and
    the predicted loss where it is known."""
    rows: list[dict[str, Any]] = []
    for g in groups:
        size = sizes[g.name]
        lost = 0.0 if size is None or g.error[0] <= 0 else g.error[size] / g.error[0]
        row = {"group": g.name, "size": size, "dense_bytes": g.dense, "stored_bytes": g.bytes(size), "relative_error": lost}
        if g.predicted is not None:
            row["predicted"] = 0.0 if size is None else g.predicted[size]
        rows.append(row)
    dense, stored = (sum(r[k] for r in rows) for k in ("dense_bytes", "stored_bytes"))
    total = {"predicted": sum(r["predicted"] for r in rows)} if all("predicted" in r for r in rows) else {}
    return {"dense_bytes": dense, "stored_bytes": stored, "keep_bytes": stored / dense, **total, "groups": rows}
