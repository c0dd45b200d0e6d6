from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import Stage

if TYPE_CHECKING:
    from winnow.io import specs


class RetrieveBase(Stage):
    """A model before it is trained on a task."""

    def spec(self, w: dict[str, str]) -> specs.Source:
        model = self.plan.preset("models", w["model"])
        return {"source": model.source, "revision": model.revision}

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.model(w["model"], "base.json")
