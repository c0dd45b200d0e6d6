from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.studies.base import STUDIES, study_of


class MeasureStudy(Stage):
    """What a study measures of a model."""

    libraries = (*HUGGING_FACE, "scikit-learn")

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        spec: dict[str, Any] = {"study": w["study"], "dtype": self.dtype(w)}
        if "checkpoints" in study_of(w["study"]).reads:
            spec["checkpoints"] = self.plan.studies.checkpoints(w["study"], w["model"])
        return spec

    def code(self, w: dict[str, str]) -> list[str]:
        return [STUDIES.module(w["study"])]
