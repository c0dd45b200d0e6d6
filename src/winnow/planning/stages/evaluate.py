from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from winnow.evaluation.base import EVALUATIONS, PLAIN, Running
from winnow.planning.load import BASE, MB
from winnow.planning.stages.base import HUGGING_FACE, Stage

EVALUATING = 425 * MB  # of a process that scores a model block by block; measured
RESULT = 1e5  # bytes of what is measured

if TYPE_CHECKING:
    from winnow.planning.load import Load, Work


class Evaluate(Stage):
    """What is measured of a cell, a stage for every kind of evaluation."""

    on_device = True

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

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return EVALUATIONS[self.of].streams

    def spec(self, w: dict[str, str]) -> Mapping[str, Any]:
        """Not what it runs on: device, threads and kernels are in the result, and times are never the same bits."""
        evaluation = EVALUATIONS.build(self.plan.preset("evaluations", w["evaluation"]).model_dump())
        recovery = {"recovery": self.recovery(w["recovery"])} if "recovery" in w else {}
        given = {"name": self.plan.names["evaluations"][w["evaluation"]], "kind": self.of}
        return {**given, **evaluation.spec(), **recovery, "dtype": self.dtype(w)}

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), EVALUATIONS.module(self.of)]

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.task(w["evaluation"]) if "files" in EVALUATIONS[self.of].reads else {}

    def work(self, load: Load) -> list[Work]:
        found = []
        for cell in (cell for cell in load.cells if cell.kind == self.of):
            evaluation = EVALUATIONS.build(self.plan.config.evaluations[cell.evaluation].model_dump())
            running = Running(load.shape, load.unit, load.batch_tokens, load.activations, load.streamed, bool(cell.recovery))
            memory, temporary, operations = evaluation.work(running)
            streams = load.streamed and evaluation.streams
            kept = evaluation.kept(running)
            # streamed, a block reads one half of the files and writes the other
            passing = (temporary, (temporary + kept) * load.shape.layers / 2 if load.streamed else temporary)
            rule = self.name if cell.method else f"{self.name}_healed" if cell.recovery else self.rules[1]
            base, amounts = EVALUATING if streams else BASE, load.passes(operations)
            found += self.needed(load, 1, memory, RESULT + kept, amounts, base, rule, passing)
        return found
