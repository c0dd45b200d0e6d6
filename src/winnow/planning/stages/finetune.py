from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class FinetuneModel(Stage):
    """A model trained on a task before compression."""

    libraries = HUGGING_FACE
    on_device = True

    def spec(self, w: dict[str, str]) -> specs.Preset:
        tuning = self.plan.preset("models", w["model"]).finetune
        return {**tuning.model_dump(), "length": self.plan.task(tuning.task).length}

    def work(self, load: Load) -> list[Work]:
        tuning = self.plan.config.models[load.name].finetune
        return self.needed(load, 1, *load.tuning(tuning)) if tuning else []
