from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class TokenizeRows(Stage):
    """Windows of tokens of a task's train rows."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> specs.Windows:
        return self.plan.preset("calibrations", w["windows"]).model_dump(include={"windows", "length", "seed"})
