from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from winnow.numerics.operations import EIGEN, NONE, Operations
from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.recovery.base import RECOVERIES, OnWindows, Trained
from winnow.recovery.kinds.refine import Refine
from winnow.recovery.kinds.sequential import Sequential
from winnow.structures.rounded import feeding_back
from winnow.training.options import Tuning

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class Recover(Stage):
    """A checkpoint, or the dense model, after a recovery."""

    libraries = HUGGING_FACE
    others = ("recover_dense",)
    on_device = True

    def spec(self, w: dict[str, str]) -> specs.Recover:
        recovery = self.plan.preset("recoveries", w["recovery"])
        task = getattr(recovery, "task", None)
        spec: specs.Recover = {
            "name": self.plan.names["recoveries"][w["recovery"]],
            "recovery": self.recovery(w["recovery"]),
            "version": RECOVERIES[recovery.kind].version,
            "first_token": self.plan.preset("calibrations", w["calibration"]).first_token,
            "dtype": self.dtype(w),
        }
        if task:
            spec["length"] = self.plan.task(task).length
        return spec

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), RECOVERIES.module(self.plan.preset("recoveries", w["recovery"]).kind)]

    def uses(self, w: dict[str, str]) -> tuple[str, ...]:
        return self.plan.preset("recoveries", w["recovery"]).libraries

    def _rounds(self, method: str) -> bool:
        """Whether a method may store rounded matrices."""
        return self.plan.structure(self.plan.labels["methods"][method]).rounds()

    def work(self, load: Load) -> list[Work]:
        found, shape = [], load.shape
        fitted = sum(math.prod(m.shape) for m in shape.matrices)
        for calibration, method, budget, name in load.recoveries:
            options, rule = self.plan.config.recoveries[name], self.name if method else "recover_dense"
            if isinstance(options, Tuning):
                found += self.needed(load, 1, *load.tuning(options), rule=rule)
            if not isinstance(options, OnWindows):
                continue
            steps = getattr(options, "steps", 0)
            share = self.plan.config.budgets[budget].keep_bytes or 1.0 if budget else 1.0
            windows = self.plan.config.calibrations[calibration]
            states = 2 * windows.windows * windows.length * shape.width  # inputs and outputs of a block
            kept = (0.0, 0.0)  # bytes of finished blocks on disk
            step = options.batch * windows.length
            held = step * (3 * shape.vocabulary + 12 * shape.width * shape.layers + 4 * load.widest)
            passes = 8.0 * steps * step + 4 * windows.windows * windows.length * shape.layers
            trained = 6 * share * fitted  # parameters, gradients, two moments, the best and the exact state
            if method and isinstance(options, Trained) and options.rounded == "codes" and self._rounds(method):
                trained = 7 * fitted  # of every number, and its code
            numbers = 2.0 * shape.numbers
            if isinstance(options, Refine.Options):
                trained /= shape.layers  # a block at a time
                passes *= len(options.layers or range(shape.layers)) / shape.layers
                if load.streamed:
                    held = step * (20 * shape.width + 4 * load.widest)  # of a block with its graph
                    numbers = max(load.embeddings, 2 * shape.block())
                states, kept = 2 * states, 2 * (4.0 * share * fitted,)
            memory, operations = 4.0 * (numbers + trained + states + held), load.passes(passes * shape.numbers)
            if method and isinstance(options, Sequential.Options):
                again = options.rounded == "codes" and self._rounds(method)
                largest, more = self._refits(load, options, windows.windows * windows.length, again)
                memory, operations = memory + largest, operations + more
            work = self.needed(load, 1, memory, share * shape.bytes, operations, rule=rule, temporary=kept)
            found += [replace(one, streams=isinstance(options, Refine.Options)) for one in work]
        return found

    def _refits(self, load: Load, options: Sequential.Options, tokens: int, rounds: bool) -> tuple[float, Operations]:
        """(bytes of memory for the largest matrix, operations for all) of refitting matrices on the moments of `tokens`: as
        factors, and if any of them is rounded, by feedback; whichever takes more."""
        held, operations, both = 0.0, NONE, options.outputs == "gradient"
        for m, n in (matrix.shape for matrix in load.shape.matrices):
            held = max(held, 8.0 * (10 * m * n + 4 * n * n + (4 * m * m if both else 0)))
            again, products = Operations(products=2.0 * m * n * n, decompositions=EIGEN * min(m, n) ** 3), 2.0 * tokens * n * n
            if rounds:
                metric, each, calls = feeding_back(m, n, both)
                again = max(again, Operations(products=metric + each, calls=calls))
            if options.objective == "anchored":
                products += 2 * tokens * n * n + n**3 + 4 * m * n * n
            operations += again + Operations(products=products)
        return held, operations
