"""What a job asks of a cluster: host memory from the forecast of its stage on its model."""

from __future__ import annotations

import math
from pathlib import Path

from winnow.errors import InputError
from winnow.models.shape import shape_of
from winnow.planning.forecast import forecast
from winnow.planning.load import MB
from winnow.planning.plan import Plan

MARGIN = 1.25  # over the forecast, which leaves out what allocators keep
RUNNER = 500 * MB  # of the processes that start a job on a node and wait for it
STEP = 100  # MB; requests are multiples of it


class Needs:
    """Forecasts of a plan, worked out for a model when first asked for."""

    def __init__(self, plan: Plan, results: Path = Path("results")):
        self.plan = plan
        self.results = results
        self._found: dict[str, dict[str, float]] = {}

    def memory_mb(self, stage: str, model: str, attempt: int, otherwise: int) -> int:
        """MB for a stage on a model (by label), twice as much at every further attempt; `otherwise` at the first one where
        nothing is forecast: for a model of the hub that is not here yet or is damaged, and for stages without a forecast."""
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
            shape = shape_of(Path(model.source), None if model.local() else manifest)
        except InputError:  # the jobs that read the model say what is wrong with it
            return {}
        return {work.stage: work.memory for work in forecast(self.plan, {name: shape})}
