from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage

HELD = 4 * 2**28  # bytes: copies of the dense matrices and of a form, and what is made of it

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class TimeForms(Stage):
    """Times of the forms of a model's matrices."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> specs.TimeForms:
        """Not the machine, which is in the result: times are never the same bits."""
        label, timing = self.plan.timings()[w["timing"]]
        method = self.method({"method": label})
        return {
            "structure": method["structure"],
            "structure_version": method["structure_version"],
            "timing": timing.model_dump(exclude={"keep"}),
            "dtype": self.dtype(w),
        }

    def code(self, w: dict[str, str]) -> list[str]:
        method, _ = self.plan.timings()[w["timing"]]
        return self.plan.structures_of(method)

    def work(self, load: Load) -> list[Work]:
        """The copies that calls go through; its time depends on the machine."""
        labels = self.plan.labels
        pairs = [(labels["methods"][m], labels["budgets"][b]) for _, m, b in load.checkpoints]
        jobs = {label for pair in pairs if (label := self.plan.timing_label(*pair))}
        on_device = any(timing.device == "cuda" for _, timing in self.plan.timings().values())
        return self.needed(load, len(jobs), min(HELD, 4 * load.shape.numbers * load.unit), 1e5, on_device=on_device)
