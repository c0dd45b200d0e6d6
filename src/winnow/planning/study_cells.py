"""Which cells the studies of papers are made of, on the models that the configuration names."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from winnow.evaluation.base import PLAIN
from winnow.planning.cells import Cell
from winnow.planning.labels import Labels
from winnow.planning.paths import Paths
from winnow.studies.base import NONE, key_of, study_of

if TYPE_CHECKING:
    from winnow.io.specs import OwnNames, Trained


class StudyCells:
    """The cells of studies, beside those of experiments."""

    def __init__(self, presets: Labels, paths: Paths):
        self.presets, self.paths = presets, paths

    def models(self) -> dict[str, Cell]:
        """{model: its dense cell with a calibration}: what studies run on, the first experiment of every model that measures
        perplexity."""
        found: dict[str, Cell] = {}
        for e in self.presets.config.experiments.values():
            losses = [name for name in e.evaluations if self.presets.config.evaluations[name].kind == PLAIN]
            for model in (model for model in e.models if losses):
                found.setdefault(model, Cell(model, losses[0], self.presets.seeds(e.calibrations)[0]))
        return found

    def at(self, model_label: str) -> Cell:
        """Where studies measure a model (by label)."""
        return self.models()[self.presets.names["models"][model_label]]

    def of(self, study: str) -> list[tuple[Cell, OwnNames]]:
        """(cell, the study's own names of its method, budget and recovery) of a study on every model, dense ones first."""
        names, keys = self.presets.of_studies[study], [key_of(cell) for cell in study_of(study).cells]
        healed = dict.fromkeys(recovery for _, _, recovery in keys if recovery != NONE)
        found: list[tuple[Cell, OwnNames]] = []
        for model, at in self.models().items():
            rows = {("dense", "dense", NONE): Cell(model, at.evaluation)}
            for recovery in healed:
                cell = Cell(model, at.evaluation, at.calibration, recovery=names[recovery])
                rows["dense", "dense", recovery] = cell
            for key in keys:
                rows[key] = Cell(model, at.evaluation, at.calibration, *(names[name] for name in key))
            found += [(cell, {"method": m, "budget": b, "recovery": r}) for (m, b, r), cell in rows.items()]
        return found

    def scores(self, study: str) -> list[tuple[Cell, OwnNames]]:
        """As `of`, on the tasks of the study's kind in all experiments that have one; classification tasks with each of
        the experiment's recoveries."""
        names, own = self.presets.of_studies[study], study_of(study)
        dense: dict[Cell, OwnNames] = {}
        found: dict[Cell, OwnNames] = {}
        kind = own.scored_by
        for e in self.presets.config.experiments.values() if own.scored else ():
            tasks = [name for name in e.evaluations if self.presets.config.evaluations[name].kind == kind]
            calibration = self.presets.seeds(e.calibrations)[0]
            for model, task, recovery in product(e.models, tasks, e.recoveries if kind == "classification" else [NONE]):
                dense[Cell(model, task, kind=kind)] = {"method": "dense", "budget": "dense"}
                if self.presets.recovers(recovery):
                    healed = Cell(model, task, calibration, recovery=recovery, kind=kind)
                    dense[healed] = {"method": "dense", "budget": "dense"}
                for method, budget in own.scored:
                    cell = Cell(model, task, calibration, names[method], names[budget], recovery, kind)
                    found[cell] = {"method": method, "budget": budget}
        return [*dense.items(), *found.items()]

    def checkpoints(self, study: str, model_label: str) -> list[Trained]:
        """The study's own names and the manifest of the checkpoint of every cell on a model that has one."""
        cells = [(c, own) for c, own in self.of(study) if c.model == self.presets.names["models"][model_label]]
        return [{**own, "manifest": self.paths.made(c)} for c, own in cells if c.method or c.recovery]
