from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.evaluation.base import PLAIN
from winnow.planning.stages.base import TABLES, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class Tables(Stage):
    """The losses of all cells."""

    libraries = TABLES

    def spec(self, w: dict[str, str]) -> specs.Tables:
        return {"rows": [self.plan.row(cell) for cell in self.plan.cells.of(PLAIN)]}
