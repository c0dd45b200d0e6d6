from __future__ import annotations

import math
from typing import TYPE_CHECKING

from winnow.calibration.parts import hidden_bound, portions_of, states_at_once
from winnow.models.shape import PRODUCT
from winnow.numerics.operations import Operations
from winnow.planning.load import A_FILE, BASE
from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, Stage
from winnow.planning.stages.collect_statistics import COLLECTING

TOKENS = 2048  # of a batch, as the rule's `batch_tokens`
LOGITS = 1 << 21  # at a time, of a model that is run block by block

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class CollectGradients(Stage):
    """Second moments of the loss's gradient in the outputs of matrices."""

    libraries = HUGGING_FACE
    others = ("collect_gradients_part",)
    streams = on_device = intermediate = True

    def spec(self, w: dict[str, str]) -> specs.CollectGradients:
        calibration = self.plan.preset("calibrations", w["calibration"])
        moments: specs.GradientMoments = calibration.model_dump(include={*OF_STATISTICS, "seed"})
        return {"dtype": self.dtype(w), **moments}

    def work(self, load: Load) -> list[Work]:
        found, shape = [], load.shape
        for name in (name for name in load.calibrations if name in load.gradients):
            preset, tokens = load.calibrations[name], load.tokens(name)
            unit, base = 8 if preset.precision == "float64" else 4, BASE
            batch = min(preset.windows, max(1, load.batch_of(TOKENS) // preset.length)) * preset.length
            passes, held = 6.0 * tokens * shape.numbers, 2 * 8.0 * load.gradient  # saved sums, as in `collect_statistics`
            written = held
            memory = load.loaded + 8 * load.gradient + load.backward(batch)
            if load.streamed:
                base = COLLECTING
                layer, largest = load.gradient_of_layer
                adding = (unit + 2) * min(PRODUCT, largest) + 2 * batch * load.per_token  # with the graph of a batch
                block = 8 * layer + max(load.unit * shape.block() + adding, unit * largest)
                head = load.unit * load.embeddings + LOGITS * (8 + 4 * load.unit) + 3 * preset.length * shape.width * load.unit
                memory = max(block, head)
                states = 1.0 * tokens * shape.width * load.unit
                held, portions = self.hidden(load, name, batch // preset.length, unit)
                written = 3 * shape.layers * states + (portions - 1) * (gradients_bytes(load, unit) + load.loaded)
                passes += 2.0 * tokens * shape.numbers
            operations = load.passes(passes) + Operations(products=2.0 * tokens * load.gradient)  # of gradients in `precision`
            found += self.collecting(load, name, memory, (gradients_bytes(load, unit), held, written), operations, base)
        return found

    def hidden(self, load: Load, calibration: str, batch: int, unit: int) -> tuple[float, int]:
        """(bytes of hidden states that jobs have on disk at once, and of the sums of a layer (numbers of `unit` bytes) that are
        there twice where windows run in portions of whole batches of `batch` windows, number of portions)"""
        preset, shape = load.calibrations[calibration], load.shape
        jobs = len(self.plan.parts(load.label, self.plan.labels["calibrations"][calibration]))
        given = self.plan.resources.get(self.others[0] if jobs else self.name, {})
        window = states_at_once(shape.layers) * preset.length * shape.width * load.unit
        bound = hidden_bound(given.get("hidden_mb", 0), shape.bytes)
        portions = portions_of(math.ceil(preset.windows / max(1, jobs)), batch, window, bound)
        twice = unit * load.gradient_of_layer[0] / 2 if len(portions) > 1 else 0.0
        return max(1, jobs) * (portions[0].stop * window + twice), len(portions)


def gradients_bytes(load: Load, unit: int) -> float:
    """Bytes of the statistics of gradients, symmetric ones by half, and a number of every output."""
    outputs = sum(matrix.shape[0] for matrix in load.shape.matrices)
    return unit * (load.gradient / 2 + outputs) + A_FILE * load.shape.layers
