from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import TABLES, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class RetrieveExamples(Stage):
    """The rows of a classification task."""

    libraries = TABLES

    def spec(self, w: dict[str, str]) -> specs.Examples:
        return self.plan.tasks()[w["task"]].rows()

    def uses(self, w: dict[str, str]) -> tuple[str, ...]:
        return ("datasets",) if self.plan.tasks()[w["task"]].dataset else ()

    def files(self, w: dict[str, str]) -> dict[str, str]:
        task = self.plan.tasks()[w["task"]]
        return self.plan.outside.of(*task.train, *task.test)
