from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.metrics.base import METRICS
from winnow.models.architectures import GRADIENTS, by_rows
from winnow.numerics.operations import EIGEN, NONE, Operations
from winnow.planning.load import A_FILE
from winnow.planning.stages.base import TORCH, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.models.architectures import Matrix
    from winnow.planning.load import Load, Work
    from winnow.planning.plan import Plan
    from winnow.structures.base import Structure

A_SIZE = 32  # bytes of a size: its direction, error, numbers and predicted loss


class Factorize(Stage):
    """Factors of a method, at every size."""

    libraries = TORCH
    on_device = intermediate = True

    def spec(self, w: dict[str, str]) -> specs.Factorize:
        return {"method": self.method(w), "shard": w["shard"], "refitted": self.plan.refits(w["model"], w["method"])}

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.plan.metrics_of(w["method"])]

    def work(self, load: Load) -> list[Work]:
        found, shards = [], self.plan.config.models[load.name].shards
        for fit in load.fits:
            structure, needs = fitted_by(self.plan, fit[1])
            groups, label = load.fitted(fit[1]), self.plan.labels["methods"][fit[1]]
            rows = [of_group(load, structure, needs, group) for group in groups]
            kept = [1.0 * A_FILE + A_SIZE * (structure.limit(group) + 1) for group in groups]
            if self.plan.refits(load.label, label):
                at_once = self.plan.predicts_at_once(label)
                rows = [_left_out(structure, group, row, at_once) for group, row in zip(groups, rows, strict=True)]
                few = load.few(*fit) if at_once else []
                rows.append((8.0 * 5 * max(few, default=0) ** 2, Operations(decompositions=EIGEN * sum(n**3 for n in few)), 0.0))
            memory, operations, disk = zip(*rows, strict=True)
            found += self.needed(load, shards + (fit in load.outer), max(memory), sum(disk) + sum(kept), sum(operations, NONE))
        return found


def fitted_by(plan: Plan, method: str) -> tuple[Structure, tuple[str, ...]]:
    """A method's structure, and what its metric needs."""
    label = plan.labels["methods"][method]
    metric = plan.preset("methods", label).metric
    return plan.structure(label), METRICS[metric.kind].needs if metric else ()


def of_group(load: Load, structure: Structure, needs: tuple[str, ...], group: list[Matrix]) -> tuple[float, Operations, float]:
    """(bytes of memory, operations, bytes of tensors) of a fit; of embeddings and heads, of which some rows are fitted at a
    time."""
    if not group[0].outer:
        return structure.work(group, needs)
    parts = [structure.work([part], of_inputs(needs)) for part, _ in by_rows(group[0])]
    memory, operations, disk = zip(*parts, strict=True)
    return max(memory) + 2 * sum(disk) + load.read, sum(operations, NONE), sum(disk)


def of_inputs(needs: tuple[str, ...]) -> tuple[str, ...]:
    """The needs in a metric of embeddings and heads, whose outputs have a diagonal."""
    return tuple(need for need in needs if need not in GRADIENTS)


def _left_out(
    structure: Structure, group: list[Matrix], fit: tuple[float, Operations, float], at_once: bool
) -> tuple[float, Operations, float]:
    """The same for a fit whose tensors are not stored; `at_once`: its losses are predicted in the same job."""
    if not at_once:
        return *fit[:2], 0.0
    (memory, operations, cached), m, n = fit, sum(matrix.shape[0] for matrix in group), max(matrix.shape[1] for matrix in group)
    predicting = 0.0 if group[0].outer else structure.predicting(group)
    held = cached * (1 if structure.rounds() else 2 if structure.in_float64 else 3)  # in float64, and in the dtype of the file
    return max(memory, held + predicting), operations + Operations(products=4.0 * m * n * (m + n)), 0.0
