from __future__ import annotations

from typing import Any

from winnow.evaluation.base import EVALUATIONS, PLAIN
from winnow.planning.stages.base import HUGGING_FACE, Stage


class Evaluate(Stage):
    """What is measured of a cell, a stage for every kind of evaluation."""

    @classmethod
    def kinds(cls) -> list[str]:
        return list(EVALUATIONS)

    @property
    def libraries(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*HUGGING_FACE, *EVALUATIONS[self.of].libraries)

    @property
    def rules(self) -> list[str]:
        dense = "evaluate_dense" if self.of == PLAIN else f"{self.name}_dense"
        return [self.name, dense, *([f"{self.name}_healed"] if EVALUATIONS[self.of].recovered else [])]

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        """Not what it runs on: device, threads and kernels are in the result, and times are never the same bits."""
        evaluation = EVALUATIONS.build(self.plan.preset("evaluations", w["evaluation"]).model_dump())
        recovery = {"recovery": self.recovery(w["recovery"])} if "recovery" in w else {}
        given = {"name": self.plan.names["evaluations"][w["evaluation"]], "kind": self.of}
        return {**given, **evaluation.spec(), **recovery, "dtype": self.dtype(w)}

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), EVALUATIONS.module(self.of)]

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.task(w["evaluation"]) if "files" in EVALUATIONS[self.of].reads else {}
