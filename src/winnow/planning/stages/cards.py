from __future__ import annotations

from typing import Any

from winnow.evaluation.base import PLAIN
from winnow.planning.cells import Cell
from winnow.planning.stages.base import Stage


class Cards(Stage):
    """The README of every checkpoint."""

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        """{card: the checkpoint that it describes, and {evaluation: the artefacts for it and for the dense model}}."""
        plan, cards = self.plan, dict[str, Any]()
        for cell in (cell for cell in plan.cells.of(PLAIN) if cell.method):
            found = cards.setdefault(
                f"{plan.paths.recovered(cell)}/README.md", {"checkpoint": plan.paths.made(cell), "evaluations": {}}
            )
            dense = plan.paths.result(Cell(cell.model, cell.evaluation))
            found["evaluations"][cell.evaluation] = {"compressed": plan.paths.result(cell), "dense": dense}
        return {"cards": cards}
