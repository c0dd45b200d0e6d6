from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import TABLES, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class RetrieveText(Stage):
    """The rows of a text."""

    libraries = TABLES

    def spec(self, w: dict[str, str]) -> specs.Text:
        return self.plan.preset("texts", w["text"]).model_dump()

    def uses(self, w: dict[str, str]) -> tuple[str, ...]:
        return ("datasets",) if self.plan.preset("texts", w["text"]).dataset else ()

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.of(*self.plan.preset("texts", w["text"]).files)
