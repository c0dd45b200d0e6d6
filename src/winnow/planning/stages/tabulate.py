from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.evaluation.base import EVALUATIONS
from winnow.planning.stages.base import TABLES, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class Tabulate(Stage):
    """The table of a kind of evaluation."""

    libraries = TABLES

    @classmethod
    def kinds(cls) -> list[str]:
        return [kind for kind, evaluation in EVALUATIONS.items() if evaluation.table]

    def spec(self, w: dict[str, str]) -> specs.Tabulate:
        return {"table": str(EVALUATIONS[self.of].table), "rows": [self.plan.row(cell) for cell in self.plan.cells.of(self.of)]}

    def code(self, w: dict[str, str]) -> list[str]:
        return [str(EVALUATIONS[self.of].table).split(":")[0]]
