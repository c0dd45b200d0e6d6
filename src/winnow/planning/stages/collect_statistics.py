from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.numerics.operations import Operations
from winnow.planning.load import A_FILE, BASE, MB
from winnow.planning.stages.base import HUGGING_FACE, Stage

COLLECTING = 485 * MB  # of a process that does so block by block; measured
TABLE, ROW = 50 * MB, 600  # bytes of the table of channels: of the library that writes it, and of a row in all its copies
ROW_FILE = 50  # bytes of a row in its file; measured

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class CollectStatistics(Stage):
    """Second moments of the inputs of matrices."""

    libraries = HUGGING_FACE
    others = ("collect_statistics_part",)
    streams = on_device = intermediate = True

    def spec(self, w: dict[str, str]) -> specs.CollectStatistics:
        spec: specs.Moments = self.plan.preset("calibrations", w["calibration"]).model_dump(include={"precision", "first_token"})
        return {"dtype": self.dtype(w), **spec}

    def work(self, load: Load) -> list[Work]:
        found, shape = [], load.shape
        for name, preset in load.calibrations.items():
            tokens, unit = load.tokens(name), 8 if preset.precision == "float64" else 4
            sums = 8.0 * (load.gram + load.cross)
            memory, base = load.loaded + sums + load.activations, BASE
            held = written = 2 * sums  # saved every now and then: the last ones while the next are written
            if load.streamed:
                batch = min(preset.windows, max(1, load.batch_tokens // preset.length)) * preset.length
                memory = load.unit * (shape.block() + load.embeddings) + shape.layer_sums(unit) + batch * load.per_token
                memory, base = max(memory, TABLE + ROW * sum(shape.sites().values())), COLLECTING
                states = 1.0 * tokens * shape.width * load.unit  # before and behind a block
                held, written = 2 * states, shape.layers * states
            operations = load.passes(2.0 * tokens * shape.numbers)
            operations += _products(load, unit, 2.0 * tokens * (load.gram + load.cross))
            disk = (moments_bytes(load, unit), held, written)
            found += self.collecting(load, name, memory, disk, operations, base)
        return found


def _products(load: Load, unit: int, operations: float) -> Operations:
    """Of moments: 16 bits are multiplied as they are for a `precision` of float32."""
    return load.passes(operations) if unit == 4 else Operations(products=operations)


def moments_bytes(load: Load, unit: int) -> float:
    """Bytes of the statistics of a calibration, symmetric ones by half, in numbers of `unit` bytes; of every channel five, and a
    row of the table."""
    channels = sum(load.shape.sites().values())
    return unit * (load.gram / 2 + load.cross) + (5 * unit + ROW_FILE) * channels + A_FILE * load.shape.layers
