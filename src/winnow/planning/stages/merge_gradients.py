from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.numerics.operations import Operations
from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.planning.stages.collect_gradients import gradients_bytes
from winnow.planning.stages.collect_statistics import COLLECTING

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class MergeGradients(Stage):
    """The statistics of `collect_gradients` from the sums of jobs that each ran a part of the windows."""

    libraries = HUGGING_FACE
    intermediate = True

    def spec(self, w: dict[str, str]) -> specs.CollectGradients:
        return self.plan.stages["collect_gradients"].spec(w)  # type: ignore[return-value]

    def code(self, w: dict[str, str]) -> list[str]:
        # of the jobs whose sums are gone by then
        return ["winnow.checkpoint.loading", "winnow.checkpoint.streaming", "winnow.calibration.gradients_by_block"]

    def work(self, load: Load) -> list[Work]:
        found = []
        for name in (name for name in load.calibrations if name in load.gradients):
            if parts := len(self.plan.parts(load.label, self.plan.labels["calibrations"][name])):
                unit = 8 if load.calibrations[name].precision == "float64" else 4
                layer, largest = load.gradient_of_layer
                memory, disk = 24 * largest + unit * layer, gradients_bytes(load, unit)
                operations = Operations(products=4.0 * parts * load.gradient)
                found += self.needed(load, 1, memory, disk, operations, COLLECTING, temporary=(parts * disk, 0.0))
        return found
