from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import TASKS, Stage


class RetrieveTasks(Stage):
    """Facts of lm-eval's tasks."""

    libraries = TASKS

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return self.plan.preset("evaluations", w["evaluation"]).model_dump(exclude={"kind"})

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.task(w["evaluation"])
