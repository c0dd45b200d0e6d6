from __future__ import annotations

import math
from typing import TYPE_CHECKING

from winnow.models.shape import PRODUCT
from winnow.planning.load import BASE
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
    streams = True

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
            disk, hidden, operations = unit * load.gradient / 2, 0.0, 6 * tokens * shape.numbers + 2 * tokens * load.gradient
            memory = load.loaded + 8 * load.gradient + load.backward(batch)
            if load.streamed:
                base = COLLECTING
                layer, largest = load.gradient_of_layer
                adding = (unit + 2) * min(PRODUCT, largest) + 2 * batch * load.per_token  # with the graph of a batch
                block = 8 * layer + max(load.unit * shape.block() + adding, unit * largest)
                head = load.unit * load.embeddings + LOGITS * (8 + 4 * load.unit) + 3 * preset.length * shape.width * load.unit
                memory = max(block, head)
                hidden = 2.0 * (math.isqrt(shape.layers) + 2) * tokens * shape.width * load.unit
                operations += 2 * tokens * shape.numbers
            found += self.collecting(load, name, memory, (disk, hidden), operations, base)
        return found
