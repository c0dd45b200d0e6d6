from __future__ import annotations

import math
from typing import TYPE_CHECKING

from winnow.planning.stages.base import TABLES, TORCH, Stage

if TYPE_CHECKING:
    from winnow.planning.load import Load, Work


class MeasureSpectra(Stage):
    """Errors and effective ranks of all groups by size."""

    libraries = (*TORCH, *TABLES)
    intermediate = True

    def spec(self, w: dict[str, str]) -> dict[str, str]:
        return {"metric": self.plan.preset("methods", w["method"]).objective}

    def work(self, load: Load) -> list[Work]:
        return [w for _, m in load.fits for w in self.needed(load, 1, 4 * max(map(math.prod, load.sides(m))), 1e6)]
