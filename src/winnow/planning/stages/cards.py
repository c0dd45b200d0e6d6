from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.evaluation.base import PLAIN
from winnow.planning.cells import Cell
from winnow.planning.stages.base import Stage

if TYPE_CHECKING:
    from winnow.io import specs


class Cards(Stage):
    """The README of every checkpoint."""

    def spec(self, w: dict[str, str]) -> specs.Cards:
        """{card: the checkpoint that it describes, and {evaluation: the artefacts for it and for the dense model}}."""
        plan = self.plan
        cards: dict[str, specs.Card] = {}
        for cell in (cell for cell in plan.cells.of(PLAIN) if cell.method):
            found = cards.setdefault(
                f"{plan.paths.recovered(cell)}/README.md", {"checkpoint": plan.paths.made(cell), "evaluations": {}}
            )
            dense = plan.paths.result(Cell(cell.model, cell.evaluation))
            found["evaluations"][cell.evaluation] = {"compressed": plan.paths.result(cell), "dense": dense}
        return {"cards": cards}
