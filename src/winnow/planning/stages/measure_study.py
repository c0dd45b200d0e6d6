from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.studies.base import STUDIES, study_of

if TYPE_CHECKING:
    from winnow.io import specs


class MeasureStudy(Stage):
    """What a study measures of a model."""

    libraries = (*HUGGING_FACE, "scikit-learn")

    def spec(self, w: dict[str, str]) -> specs.MeasureStudy:
        spec: specs.MeasureStudy = {"study": w["study"], "dtype": self.dtype(w)}
        if "checkpoints" in study_of(w["study"]).reads:
            spec["checkpoints"] = self.plan.studies.checkpoints(w["study"], w["model"])
        return spec

    def code(self, w: dict[str, str]) -> list[str]:
        return [STUDIES.module(w["study"])]
