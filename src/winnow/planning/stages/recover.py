from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.recovery.base import RECOVERIES


class Recover(Stage):
    """A checkpoint, or the dense model, after a recovery."""

    libraries = HUGGING_FACE
    others = ("recover_dense",)

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        recovery = self.plan.preset("recoveries", w["recovery"])
        task = getattr(recovery, "task", None)
        return {
            "name": self.plan.names["recoveries"][w["recovery"]],
            "recovery": self.recovery(w["recovery"]),
            **({"length": self.plan.task(task).length} if task else {}),
            "version": RECOVERIES[recovery.kind].version,
            "first_token": self.plan.preset("calibrations", w["calibration"]).first_token,
            "dtype": self.dtype(w),
        }

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), RECOVERIES.module(self.plan.preset("recoveries", w["recovery"]).kind)]

    def uses(self, w: dict[str, str]) -> tuple[str, ...]:
        return self.plan.preset("recoveries", w["recovery"]).libraries
