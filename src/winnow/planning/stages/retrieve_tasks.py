from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import TASKS, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class RetrieveTasks(Stage):
    """Facts of lm-eval's tasks."""

    libraries = TASKS

    def spec(self, w: dict[str, str]) -> specs.Tasks:
        return self.plan.preset("evaluations", w["evaluation"]).model_dump(exclude={"kind"})

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.task(w["evaluation"])
