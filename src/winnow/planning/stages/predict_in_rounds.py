from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.allocation.base import ALLOCATIONS
from winnow.numerics.operations import Operations
from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, TABLES, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


TOKENS = 2048  # of a batch, as the rule's `batch_tokens`


class PredictInRounds(Stage):
    """Losses predicted anew around the model as it was allocated before."""

    libraries = (*HUGGING_FACE, *TABLES)
    on_device = intermediate = True

    def spec(self, w: dict[str, str]) -> specs.PredictInRounds:
        calibration = self.plan.preset("calibrations", w["calibration"])
        moments: specs.GradientMoments = calibration.model_dump(include={*OF_STATISTICS, "seed"})
        return {
            **self.method(w),
            **moments,
            "dtype": self.dtype(w),
            "budget": self.plan.preset("budgets", w["budget"]).model_dump(),
            "rounds": self.plan.allocation(w["budget"]).rounds(),
            "allocation": self.allocation(w),
        }

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.refitting(w), ALLOCATIONS.module(self.plan.allocation(w["budget"]).kind())]

    def work(self, load: Load) -> list[Work]:
        found, second = [], load.gram + load.gradient
        for calibration, _, budget in load.checkpoints:
            if rounds := self.plan.allocation(self.plan.labels["budgets"][budget]).rounds():
                tokens = load.tokens(calibration)
                operations = load.passes(rounds * 10.0 * tokens * load.shape.numbers)
                operations += Operations(products=rounds * 2.0 * tokens * second)
                batch = min(tokens, max(load.batch_of(TOKENS), load.calibrations[calibration].length))
                found += self.needed(load, 1, 2 * load.loaded + 8 * second + load.backward(batch), 1e6, operations)
        return found
