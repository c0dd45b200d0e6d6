from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class CollectGradients(Stage):
    """Second moments of the loss's gradient in the outputs of matrices."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> specs.CollectGradients:
        calibration = self.plan.preset("calibrations", w["calibration"])
        moments: specs.GradientMoments = calibration.model_dump(include={*OF_STATISTICS, "seed"})
        return {"dtype": self.dtype(w), **moments}

    def work(self, load: Load) -> list[Work]:
        found = []
        for name in (name for name in load.calibrations if name in load.gradients):
            tokens, unit = load.tokens(name), 8 if load.calibrations[name].precision == "float64" else 4
            memory = load.loaded + 8 * load.gradient + load.backward
            operations = 6 * tokens * load.shape.numbers + 2 * tokens * load.gradient
            found += self.needed(load, 1, memory, unit * load.gradient, operations)
        return found
