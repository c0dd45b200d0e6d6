from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, Stage


class CollectStatistics(Stage):
    """Second moments of the inputs of matrices."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        spec = self.plan.preset("calibrations", w["calibration"]).model_dump(include={"precision", "first_token"})
        return {"dtype": self.dtype(w), **spec}
