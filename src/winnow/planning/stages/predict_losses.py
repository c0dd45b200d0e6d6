from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.models.architectures import AT_ONCE
from winnow.numerics.operations import EIGEN, Operations
from winnow.planning.load import WITHOUT_MODELS
from winnow.planning.stages.base import TABLES, TORCH, Stage
from winnow.planning.stages.factorize import fitted_by, of_group

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class PredictLosses(Stage):
    """The predicted loss of every size."""

    libraries = (*TORCH, *TABLES)
    on_device = intermediate = True

    def spec(self, w: dict[str, str]) -> specs.PredictLosses:
        return {**self.method(w), "fits_again": self._fits_again(w["model"], w["method"])}

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.refitting(w)]

    def _fits_again(self, model: str, method: str) -> bool:
        return self.plan.refits(model, method) and not self.plan.predicts_at_once(method)

    def work(self, load: Load) -> list[Work]:
        found = []
        for calibration, method in (fit for fit in load.fits if fit in load.predicted):
            sides, few = load.sides(method), load.few(calibration, method)
            label = self.plan.labels["methods"][method]
            structure, needs = fitted_by(self.plan, method)
            again = self._fits_again(load.label, label)
            if self.plan.refits(load.label, label) and not again:  # it only gathers what is predicted
                found += self.needed(load, 1, 0.0, 1e6, base=WITHOUT_MODELS)
                continue
            blocks = [group for group in load.fitted(method) if not group[0].outer]
            held = max(structure.predicting(group) for group in blocks)
            if len(blocks) < len(load.fitted(method)):  # a part of one matrix, and all of its codes
                held = max(held, 8 * 8 * AT_ONCE + structure.work([load.shape.outer[0]], ())[2] + load.read)
            products, eigen = sum(4.0 * m * n * (m + n) for m, n in sides), EIGEN * sum(n**3 for n in few)
            memory = held + 8 * 5 * max(few, default=0) ** 2
            operations = Operations(products=products, decompositions=eigen)
            for group in load.fitted(method) if again else ():
                fitting, taken, _ = of_group(load, structure, needs, group)
                memory, operations = max(memory, fitting), operations + taken
            found += self.needed(load, 1, memory, 1e6, operations, WITHOUT_MODELS)
        return found
