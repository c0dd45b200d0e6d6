"""Paths of artefacts, from labels."""

from __future__ import annotations

from winnow.models.architectures import OUTER
from winnow.planning.cells import Cell, Cells
from winnow.planning.labels import Labels


class Paths:
    """Where the results of cells are."""

    def __init__(self, presets: Labels, cells: Cells):
        self.presets, self.cells = presets, cells

    def folder(self, cell: Cell, *sections: str) -> str:
        one = {"models": cell.model, "calibrations": cell.calibration, "methods": cell.method}
        one |= {"budgets": cell.budget, "recoveries": cell.recovery}
        return "/".join(["results", *(self.presets.labels[s][one[s]] for s in sections)])  # type: ignore[index]

    def result(self, cell: Cell) -> str:
        """The path of what was measured at a cell."""
        evaluation = self.presets.labels["evaluations"][cell.evaluation]
        if cell.method is None and cell.recovery is None:
            return f"{self.folder(cell, 'models')}/dense/{evaluation}.json"
        return f"{self.recovered(cell)}/{evaluation}.json"

    def recovered(self, cell: Cell) -> str:
        """The folder of a cell that names a recovery."""
        if cell.method is None:
            return f"{self.folder(cell, 'models', 'calibrations')}/dense/{self.presets.labels['recoveries'][str(cell.recovery)]}"
        return self.folder(cell, "models", "calibrations", "methods", "budgets", "recoveries")

    def made(self, cell: Cell, what: str = "checkpoint") -> str:
        """The manifest of the checkpoint (or of `dense_export`) of a compressed cell, after its recovery if it has one."""
        if self.presets.recovers(str(cell.recovery)):
            return f"{self.recovered(cell)}/{what}/manifest.json"
        return f"{self.folder(cell, 'models', 'calibrations', 'methods', 'budgets')}/{what}/manifest.json"

    def of_members(self, model: str, calibration: str, method: str, name: str) -> list[str]:
        """The files `name` of a method by labels, or of the methods that it chooses between, one after the other; with `{shard}`
        in the name, of all shards; equally many of each method."""
        labels = [
            self.presets.labels["methods"][member] for member in self.presets.members[self.presets.names["methods"][method]]
        ]
        shards = self.presets.shards(model) if "{shard}" in name else [""]
        shards += [OUTER] if "{shard}" in name and self.cells.has_outer(model, calibration, method) else []
        return [f"results/{model}/{calibration}/{label}/{name.format(shard=shard)}" for label in labels for shard in shards]

    def parts(self, model: str, calibration: str, what: str) -> list[str]:
        """The sums (`moments` or `gradients`) of all parts of a calibration's windows, by labels."""
        parts = self.presets.parts(model, calibration)
        return [f"results/{model}/{calibration}/statistics/parts/{what}/{part}/manifest.json" for part in parts]

    def outer(self, model: str, calibration: str, method: str) -> str | list[str]:
        """The statistics of the embeddings and the head, by labels; an empty list if a method's factors have none."""
        found = self.cells.has_outer(model, calibration, method)
        return f"results/{model}/{calibration}/statistics/outer/manifest.json" if found else []

    def measurement(self, study: str, cell: Cell) -> str:
        """What a study measures on a model's weights and statistics."""
        return f"{self.folder(cell, 'models', 'calibrations')}/studies/{study}.json"
