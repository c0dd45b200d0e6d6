"""Host memory that a job requests on a cluster, from the forecast of its stage for its model."""

from __future__ import annotations

import math
from pathlib import Path

from winnow.errors import InputError
from winnow.models.shape import shape_of
from winnow.planning.forecast import forecast
from winnow.planning.load import MB
from winnow.planning.plan import Plan

MARGIN = 1.25  # factor on the forecast, which does not include memory kept by allocators
RUNNER = 500 * MB  # for the processes that start a job on a node and wait for it
STEP = 100  # MB; requests are multiples of it


class Needs:
    """Forecasts of a plan, computed for a model on first use."""

    def __init__(self, plan: Plan, results: Path = Path("results")):
        self.plan = plan
        self.results = results
        self._found: dict[str, dict[str, float]] = {}

    def memory_mb(self, stage: str, model: str, attempt: int, otherwise: int) -> int:
        """MB for a stage on a model (by label), doubled at every further attempt; `otherwise` for the first attempt if there is
        no forecast: for a hub model that is not downloaded yet or is damaged, and for stages without a forecast."""
        if model not in self._found:
            self._found[model] = self._of(model)
        memory = self._found[model].get(stage)
        first = otherwise if memory is None else STEP * math.ceil((MARGIN * memory + RUNNER) / MB / STEP)
        return first * 2 ** (attempt - 1)

    def _of(self, label: str) -> dict[str, float]:
        """{stage: bytes of its largest job}"""
        name, manifest = self.plan.names["models"][label], self.results / label / "model.json"
        model = self.plan.config.models[name]
        if not model.local() and not manifest.is_file():
            return {}
        try:
            made = not model.local() or self.plan.dequantized(label)
            shape = shape_of(Path(model.source), manifest if made else None, model.stored_dtype)
        except InputError:  # reported by the jobs that read the model
            return {}
        found: dict[str, float] = {}
        for work in forecast(self.plan, {name: shape}):
            found[work.stage] = max(work.memory, found.get(work.stage, 0.0))
        return found
