from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from winnow.numerics.operations import Operations
from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.studies.base import STUDIES, Asked, study_of

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class MeasureStudy(Stage):
    """What a study measures of a model."""

    libraries = (*HUGGING_FACE, "scikit-learn")
    on_device = True

    def spec(self, w: dict[str, str]) -> specs.MeasureStudy:
        spec: specs.MeasureStudy = {"study": w["study"], "dtype": self.dtype(w)}
        if options := getattr(self.plan.config.studies, w["study"]).model_dump(exclude_defaults=True):
            spec["options"] = options
        if "checkpoints" in study_of(w["study"]).reads:
            spec["checkpoints"] = self.plan.studies.checkpoints(w["study"], w["model"])
        return spec

    def code(self, w: dict[str, str]) -> list[str]:
        return [STUDIES.module(w["study"])]

    def work(self, load: Load) -> list[Work]:
        """One row for every study, whose jobs only its own target asks for."""
        at = self.plan.studies.models().get(load.name)
        if at is None or at.calibration is None:
            return []
        calibration = self.plan.config.calibrations[at.calibration]
        evaluation: Any = self.plan.config.evaluations[at.evaluation]  # of kind perplexity
        found = []
        for name in STUDIES:
            study = study_of(name, getattr(self.plan.config.studies, name).model_dump())
            asked = Asked(
                load.shape,
                load.unit,
                (calibration.windows, calibration.length),
                (evaluation.windows, evaluation.length),
                len(study.cells),
            )
            memory, operations = study.work(asked)
            works = self.needed(load, 1, memory, 0.0, Operations(products=operations))
            found += [replace(work, target=f"study_{name}") for work in works]
        return found
