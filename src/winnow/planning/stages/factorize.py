from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.metrics.base import METRICS
from winnow.models.architectures import GRADIENTS, by_rows
from winnow.planning.stages.base import TORCH, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class Factorize(Stage):
    """Factors of a method, at every size."""

    libraries = TORCH

    def spec(self, w: dict[str, str]) -> specs.Factorize:
        return {"method": self.method(w), "shard": w["shard"]}

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.plan.metrics_of(w["method"])]

    def work(self, load: Load) -> list[Work]:
        found, shards = [], self.plan.config.models[load.name].shards
        for fit in load.fits:
            label = self.plan.labels["methods"][fit[1]]
            structure, metric = self.plan.structure(label), self.plan.preset("methods", label).metric
            needs, rows = METRICS[metric.kind].needs if metric else (), []
            for group in load.fitted(fit[1]):
                if not group[0].outer:
                    rows.append(structure.work(group, needs))
                    continue
                inputs = tuple(need for need in needs if need not in GRADIENTS)  # of the outputs there is a diagonal
                parts = [structure.work([part], inputs) for part, _ in by_rows(group[0])]
                memory, operations, disk = zip(*parts, strict=True)
                rows.append((max(memory) + 2 * sum(disk) + load.read, sum(operations), sum(disk)))
            memory, operations, disk = zip(*rows, strict=True)
            found += self.needed(load, shards + (fit in load.outer), max(memory), sum(disk), sum(operations))
        return found
