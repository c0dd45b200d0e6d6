from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import Stage, source_of

if TYPE_CHECKING:
    from winnow.io import specs


class RetrieveBase(Stage):
    """A model before it is trained on a task."""

    def spec(self, w: dict[str, str]) -> specs.Source:
        return source_of(self.plan, w["model"])

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return {} if self.plan.dequantized(w["model"]) else self.plan.outside.model(w["model"], "base.json")
