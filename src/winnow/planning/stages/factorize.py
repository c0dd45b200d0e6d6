from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.metrics.base import METRICS
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
        for _, method in load.fits:
            label = self.plan.labels["methods"][method]
            structure, metric = self.plan.structure(label), self.plan.preset("methods", label).metric
            needs = METRICS[metric.kind].needs if metric else ()
            memory, operations, disk = zip(
                *(structure.work(g, needs) for g in structure.groups(load.shape.matrices)), strict=True
            )
            found += self.needed(load, shards, max(memory), sum(disk), sum(operations))
        return found
