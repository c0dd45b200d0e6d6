from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.numerics.operations import Operations
from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.planning.stages.collect_gradients import TOKENS

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class CollectOuter(Stage):
    """Statistics of the embeddings and the head."""

    libraries = HUGGING_FACE
    on_device = intermediate = True

    def spec(self, w: dict[str, str]) -> specs.CollectGradients:
        return self.plan.stages["collect_gradients"].spec(w)  # type: ignore[return-value]

    def work(self, load: Load) -> list[Work]:
        found, shape = [], load.shape
        for name in (name for name in load.calibrations if any(name == calibration for calibration, _ in load.outer)):
            preset, tokens = load.calibrations[name], load.tokens(name)
            batch = min(preset.windows, max(1, TOKENS // preset.length)) * preset.length
            sums = 2 * (shape.width**2 + shape.vocabulary)
            disk = 8 * 3 * (shape.width**2 + shape.vocabulary)
            operations = load.passes(6.0 * tokens * shape.numbers) + Operations(products=4.0 * tokens * shape.width**2)
            found += self.needed(load, 1, load.loaded + 8 * sums + load.backward(batch), disk, operations)
        return found
