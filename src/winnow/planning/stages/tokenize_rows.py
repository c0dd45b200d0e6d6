from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import HUGGING_FACE, Stage


class TokenizeRows(Stage):
    """Windows of tokens of a task's train rows."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return self.plan.preset("calibrations", w["windows"]).model_dump(include={"windows", "length", "seed"})
