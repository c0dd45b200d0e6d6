from __future__ import annotations

from typing import Any

from winnow.allocation.base import ALLOCATIONS
from winnow.planning.stages.base import HUGGING_FACE, TABLES, Stage


class LearnSizes(Stage):
    """Sizes that are learned by gradient."""

    libraries = (*HUGGING_FACE, *TABLES)

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return {
            **self.structure(w),
            "dtype": self.dtype(w),
            "budget": self.plan.preset("budgets", w["budget"]).model_dump(),
            "allocation": self.allocation(w),
        }

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), ALLOCATIONS.module(self.plan.allocation(w["budget"]).kind())]
