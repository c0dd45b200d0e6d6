from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.models.shape import WIDTHS
from winnow.planning.stages.base import HUGGING_FACE, Stage

if TYPE_CHECKING:
    from winnow.planning.load import Load, Work


class ExportDense(Stage):
    """A checkpoint multiplied out to dense matrices."""

    libraries = HUGGING_FACE
    others = ("export_dense_recovered",)

    def spec(self, w: dict[str, str]) -> dict[str, str]:
        steps = ("model", "calibration", "method", "budget", "recovery")
        made = "/".join(["results", *(w[step] for step in steps if step in w), "dense_export/manifest.json"])
        return {"dtype": self.plan.export_dtypes.get(made, "original")}

    def work(self, load: Load) -> list[Work]:
        found, (outputs, inputs) = [], load.largest
        for dtype in (of for made, of in self.plan.export_dtypes.items() if made.split("/")[1] == load.label):
            written = load.shape.numbers * WIDTHS[dtype] if dtype in WIDTHS else load.shape.bytes
            found += self.needed(load, 1, written + 3 * 8 * outputs * inputs, written)
        return found
