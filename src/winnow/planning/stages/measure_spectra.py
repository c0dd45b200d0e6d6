from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import TABLES, TORCH, Stage


class MeasureSpectra(Stage):
    """Errors and effective ranks of all groups by size."""

    libraries = (*TORCH, *TABLES)

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return {"metric": self.plan.preset("methods", w["method"]).objective}
