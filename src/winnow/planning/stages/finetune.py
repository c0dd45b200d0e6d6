from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, Stage


class FinetuneModel(Stage):
    """A model trained on a task before compression."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        tuning = self.plan.preset("models", w["model"]).finetune
        return {**tuning.model_dump(), "length": self.plan.task(tuning.task).length}
