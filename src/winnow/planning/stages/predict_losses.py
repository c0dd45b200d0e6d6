from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import TABLES, TORCH, Stage


class PredictLosses(Stage):
    """The predicted loss of every size."""

    libraries = (*TORCH, *TABLES)

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return self.structure(w)
