from __future__ import annotations

import math
from typing import TYPE_CHECKING

from winnow.calibration.parts import hidden_bound, portions_of, states_at_once
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
                hidden = self.hidden(load, name, batch // preset.length, unit)
                operations += 2 * tokens * shape.numbers
            found += self.collecting(load, name, memory, (disk, hidden), operations, base)
        return found

    def hidden(self, load: Load, calibration: str, batch: int, unit: int) -> float:
        """Bytes of hidden states that jobs have on disk at once, and of the sums of a layer (of numbers of `unit` bytes) that are
        there twice where windows run in portions of whole batches of `batch` windows."""
        preset, shape = load.calibrations[calibration], load.shape
        jobs = len(self.plan.parts(load.label, self.plan.labels["calibrations"][calibration]))
        given = self.plan.resources.get(self.others[0] if jobs else self.name, {})
        window = states_at_once(shape.layers) * preset.length * shape.width * load.unit
        bound = hidden_bound(given.get("hidden_mb", 0), shape.bytes)
        portions = portions_of(math.ceil(preset.windows / max(1, jobs)), batch, window, bound)
        twice = unit * load.gradient_of_layer[0] / 2 if len(portions) > 1 else 0.0
        return max(1, jobs) * (portions[0].stop * window + twice)
