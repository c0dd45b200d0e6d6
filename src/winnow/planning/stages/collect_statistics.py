from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.load import BASE, MB
from winnow.planning.stages.base import HUGGING_FACE, Stage

COLLECTING = 485 * MB  # of a process that does so block by block; measured
TABLE, ROW = 50 * MB, 600  # bytes of the table of channels: of the library that writes it, and of a row in all its copies

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class CollectStatistics(Stage):
    """Second moments of the inputs of matrices."""

    libraries = HUGGING_FACE
    others = ("collect_statistics_part",)
    streams = True

    def spec(self, w: dict[str, str]) -> specs.CollectStatistics:
        spec: specs.Moments = self.plan.preset("calibrations", w["calibration"]).model_dump(include={"precision", "first_token"})
        return {"dtype": self.dtype(w), **spec}

    def work(self, load: Load) -> list[Work]:
        found, shape = [], load.shape
        for name, preset in load.calibrations.items():
            tokens, unit = load.tokens(name), 8 if preset.precision == "float64" else 4
            memory = load.loaded + 8 * (load.gram + load.cross) + load.activations
            disk, hidden, base = unit * (load.gram / 2 + load.cross), 0.0, BASE
            if load.streamed:
                batch = min(preset.windows, max(1, load.batch_tokens // preset.length)) * preset.length
                memory = load.unit * (shape.block() + load.embeddings) + shape.layer_sums(unit) + batch * load.per_token
                memory, base = max(memory, TABLE + ROW * sum(shape.sites().values())), COLLECTING
                hidden = 2.0 * tokens * shape.width * load.unit
            operations = 2 * tokens * (shape.numbers + load.gram + load.cross)
            found += self.collecting(load, name, memory, (disk, hidden), operations, base)
        return found
