from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from winnow.allocation.base import ALLOCATIONS
from winnow.models.architectures import FFN_ROLES, by_rows
from winnow.numerics.operations import NONE, Operations
from winnow.planning.config import Calibration
from winnow.planning.labels import EXECUTION
from winnow.planning.load import WITHOUT_MODELS
from winnow.planning.stages.base import TABLES, TORCH, Stage
from winnow.planning.stages.factorize import fitted_by, of_group, of_inputs

SIZE = 190  # bytes of a size of a fit (what it stores, what it loses), of all matrices at once, in all copies; measured

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class Compress(Stage):
    """A checkpoint at a budget."""

    libraries = (*TORCH, *TABLES)
    others = ("compress_refitted",)

    def spec(self, w: dict[str, str]) -> specs.Compress:
        plan = self.plan
        sections = ("models", "calibrations", "methods", "budgets")
        names = {s.removesuffix("s"): plan.names[s][w[s.removesuffix("s")]] for s in sections}
        names["calibration"] = plan.preset_of_seed[names["calibration"]]
        names["budget"] = plan.budget_name(names["budget"])
        calibration = plan.preset("calibrations", w["calibration"])
        return {
            "names": names,
            "allocation": self.allocation(w),
            "dtype": self.dtype(w),
            "presets": {
                "model": plan.preset("models", w["model"]).model_dump(exclude=EXECUTION | {"stored_dtype"}),
                "calibration": calibration.model_dump(exclude_none=True),
                "calibration_text": self._calibration_text(calibration),
                "method": self.method(w),
                "budget": plan.preset("budgets", w["budget"]).model_dump(),
            },
        }

    def _calibration_text(self, calibration: Calibration) -> specs.Preset:
        """Where the words of a calibration come from, for the recipe."""
        if calibration.text is None:
            task = self.plan.task(str(calibration.task))
            hub = {"subset": task.subset, "split": task.train_split, "revision": task.revision} if task.dataset else {}
            return {"files": task.train, "dataset": task.dataset, **hub, "columns": task.columns}
        return self.plan.config.texts[calibration.text].model_dump(exclude_defaults=True, mode="json")

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.refitting(w), ALLOCATIONS.module(self.plan.allocation(w["budget"]).kind())]

    def work(self, load: Load) -> list[Work]:
        found = []
        for _, method, name in load.checkpoints:
            budget = self.plan.config.budgets[name]
            dense = load.shape.dense_bytes(budget.targets)
            sides = [side for member in self.plan.members[method] for side in load.sides(member)]
            table = SIZE * sum(m * n // (m + n) for m, n in sides)
            memory = max(load.read, 12 * max(map(math.prod, sides))) + table
            disk = load.shape.bytes - dense + (budget.keep_bytes or 1.0) * dense
            if self.plan.config.models[load.name].factors == "stored":
                found += self.needed(load, 1, memory, disk, base=WITHOUT_MODELS)
                continue
            fitting, operations = self._again(load, method)
            memory = max(memory, fitting + table)
            found += self.needed(load, 1, memory, disk, operations, rule="compress_refitted", on_device=True)
        return found

    def _again(self, load: Load, method: str) -> tuple[float, Operations]:
        """(bytes of memory, operations) of fitting what the budget chooses again: the member that takes most, for every FFN and
        every attention."""
        memory, most = 0.0, dict[tuple[int, bool], Operations]()
        for member in self.plan.members[method]:
            if not self.plan.refits(load.label, self.plan.labels["methods"][member]):
                continue
            structure, needs = fitted_by(self.plan, member)
            own = defaultdict[tuple[int, bool], Operations](Operations)
            for group in load.fitted(member):
                memory = max(memory, of_group(load, structure, needs, group)[0])
                parts = [([part], of_inputs(needs)) for part, _ in by_rows(group[0])] if group[0].outer else [(group, needs)]
                own[group[0].layer, group[0].role in FFN_ROLES] += sum((structure.again(*part) for part in parts), NONE)
            most |= {place: max(operations, most.get(place, NONE)) for place, operations in own.items()}
        return memory, sum(most.values(), NONE)
