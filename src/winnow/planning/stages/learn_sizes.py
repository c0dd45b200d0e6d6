from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from winnow.allocation.base import ALLOCATIONS
from winnow.models.architectures import select
from winnow.planning.stages.base import HUGGING_FACE, TABLES, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.numerics.operations import Operations
    from winnow.planning.config import Budget
    from winnow.planning.load import Load, Work


class LearnSizes(Stage):
    """Sizes that are learned by gradient."""

    libraries = (*HUGGING_FACE, *TABLES)
    on_device = True

    def spec(self, w: dict[str, str]) -> specs.LearnSizes:
        return {
            **self.method(w),
            "dtype": self.dtype(w),
            "budget": self.plan.preset("budgets", w["budget"]).model_dump(),
            "allocation": self.allocation(w),
        }

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.refitting(w), ALLOCATIONS.module(self.plan.allocation(w["budget"]).kind())]

    def work(self, load: Load) -> list[Work]:
        found = []
        for calibration, _, budget in load.checkpoints:
            if self.plan.allocation(self.plan.labels["budgets"][budget]).learns:
                found += self.needed(load, 1, *self._learning(load, calibration, self.plan.config.budgets[budget]))
        return found

    def _learning(self, load: Load, calibration: str, budget: Budget) -> tuple[float, float, Operations]:
        """(memory, disk, operations): the dense model with factors of as many numbers beside its chosen matrices, and what a
        backward pass needs of its tokens: of every layer, of every mask, and of the logits. A step is a forward pass of the dense
        model, and a forward and a backward pass of both; held-out windows take a forward pass of each."""
        options: Any = budget.allocation
        shape, windows, chosen = load.shape, load.calibrations[calibration], select(load.shape.matrices, budget.targets)
        factors = sum(math.prod(m.shape) for m in chosen)
        step = options.batch * windows.length
        masked = sum(2 * min(m.shape) + 3 * m.shape[0] for m in chosen)
        held = step * (5 * 4 * shape.vocabulary + load.unit * (12 * shape.width * shape.layers + masked))
        looks = (1 + options.steps / options.every) * options.held_out * windows.windows * windows.length
        passes = options.steps * step * (6 * shape.numbers + 4 * factors) + looks * 4 * shape.numbers
        return load.unit * (shape.numbers + factors) + held, 1e5, load.passes(passes)
