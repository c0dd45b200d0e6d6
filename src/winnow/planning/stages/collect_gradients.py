from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, Stage


class CollectGradients(Stage):
    """Second moments of the loss's gradient in the outputs of matrices."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        spec = self.plan.preset("calibrations", w["calibration"]).model_dump(include={*OF_STATISTICS, "seed"})
        return {"dtype": self.dtype(w), **spec}
