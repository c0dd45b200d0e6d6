from __future__ import annotations

from typing import Any

from winnow.evaluation.base import PLAIN
from winnow.planning.stages.base import TABLES, Stage


class Tables(Stage):
    """The losses of all cells."""

    libraries = TABLES

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return {"rows": [self.plan.row(cell) for cell in self.plan.cells.of(PLAIN)]}
