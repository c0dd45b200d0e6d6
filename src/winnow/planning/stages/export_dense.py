from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, Stage


class ExportDense(Stage):
    """A checkpoint multiplied out to dense matrices."""

    libraries = HUGGING_FACE
    others = ("export_dense_recovered",)

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        steps = ("model", "calibration", "method", "budget", "recovery")
        made = "/".join(["results", *(w[step] for step in steps if step in w), "dense_export/manifest.json"])
        return {"dtype": self.plan.export_dtypes.get(made, "original")}
