from __future__ import annotations

from typing import Any

from winnow.allocation.base import ALLOCATIONS
from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, TABLES, Stage


class PredictInRounds(Stage):
    """Losses predicted anew around the model as it was allocated before."""

    libraries = (*HUGGING_FACE, *TABLES)

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        calibration = self.plan.preset("calibrations", w["calibration"])
        return {
            **self.structure(w),
            **calibration.model_dump(include={*OF_STATISTICS, "seed"}),
            "dtype": self.dtype(w),
            "budget": self.plan.preset("budgets", w["budget"]).model_dump(),
            "rounds": self.plan.allocation(w["budget"]).rounds(),
            "allocation": self.allocation(w),
        }

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), ALLOCATIONS.module(self.plan.allocation(w["budget"]).kind())]
