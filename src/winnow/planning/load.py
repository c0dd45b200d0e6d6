"""What a plan asks of one model: the work of its stages, and what their arithmetic is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from winnow.calibration.few_tokens import too_few
from winnow.data.text_formats import rows_of
from winnow.models.shape import WIDTHS, Shape
from winnow.numerics.operations import Operations
from winnow.planning.rates import START, Rates

if TYPE_CHECKING:
    from winnow.models.architectures import Matrix
    from winnow.planning.cells import Cell
    from winnow.planning.config import Calibration
    from winnow.planning.plan import Plan
    from winnow.training.options import Tuning

MB, GB = 1e6, 1e9
BASE = 450 * MB  # of a process that imported what it needs, measured on the demo
WITHOUT_MODELS = 355 * MB  # of one that runs no model; measured
A_FILE = 3000  # bytes of a file of tensors beside these: what it was made of, and their names; measured
OF_DEVICE = 3 * GB  # of a process that has the libraries of a GPU; assumed


@dataclass(frozen=True)
class Work:
    """One rule for one model: how many jobs, what the largest of them needs at a time, and what all of them do and leave."""

    stage: str
    model: str
    jobs: int
    memory: float  # bytes, of the largest job
    disk: float  # bytes of results, of all jobs
    amounts: Operations  # of all jobs
    temporary: float = 0.0  # bytes of files that are removed when a job ends, or when parts are merged; of the largest job
    written: float = 0.0  # bytes that all jobs write into such files
    host: float | None = None  # bytes of host memory where `memory` is on a device; None: a job never uses one
    streams: bool = False  # whether `load: stream` takes less memory
    intermediate: bool = False  # whether its results are only there to make others: statistics, factors, predictions
    target: str = ""  # what asks for it, where `snakemake` alone does not

    @property
    def operations(self) -> float:
        """Floating point, of all jobs."""
        return self.amounts.total

    def seconds(self, rates: Rates) -> float:
        return self.jobs * START + rates.seconds(self.amounts) + (self.disk + self.written) / rates.written

    def with_more(self, other: Work) -> Work:
        """The same rule with other jobs, too."""
        return replace(
            self,
            jobs=self.jobs + other.jobs,
            memory=max(self.memory, other.memory),
            disk=self.disk + other.disk,
            amounts=self.amounts + other.amounts,
            temporary=max(self.temporary, other.temporary),
            written=self.written + other.written,
        )


@dataclass(frozen=True)
class Load:
    """The cells of one model (by preset name) in a plan, with the model's shape; numbers at a time are those of the rules."""

    plan: Plan
    name: str
    shape: Shape
    cells: list[Cell]
    batch_tokens: int
    given: Mapping[str, int] = field(default_factory=dict)  # resources that the run sets for the rule, by `--set-resources`

    @cached_property
    def label(self) -> str:
        return self.plan.labels["models"][self.name]

    @property
    def unit(self) -> int:
        """Bytes of a number in forward passes."""
        return WIDTHS[self.plan.config.models[self.name].dtype]

    @property
    def streamed(self) -> bool:
        return bool(self.given.get("stream", self.plan.config.models[self.name].load == "stream"))

    def batch_of(self, tokens: int) -> int:
        """The `batch_tokens` of a rule that has another number, `tokens`, than most."""
        return self.given.get("batch_tokens", tokens)

    def on(self, given: Mapping[str, int]) -> Load:
        """The same for a rule for which the run sets resources."""
        if not given:
            return self
        return replace(self, given=given, batch_tokens=given.get("batch_tokens", self.batch_tokens))

    @property
    def loaded(self) -> float:
        """Bytes of the model's numbers."""
        return self.shape.numbers * self.unit

    @property
    def host(self) -> float:
        """Bytes that the host holds of a job whose tensors are on a device: what is read and written at a time, of weights a
        block with the embeddings (all, if they are loaded at once), of statistics those of a layer, twice."""
        unit = 8 if any(preset.precision == "float64" for preset in self.calibrations.values()) else 4
        statistics = unit * ((self.gram + self.cross) / self.shape.layers + self.gradient_of_layer[0])
        return OF_DEVICE + 2 * statistics + (self.unit * (self.shape.block() + self.embeddings) if self.streamed else self.loaded)

    def passes(self, operations: float) -> Operations:
        """Operations of products in the model's dtype."""
        return Operations(half=operations) if self.unit == 2 else Operations(products=operations)

    @cached_property
    def calibrations(self) -> dict[str, Calibration]:
        names = dict.fromkeys(cell.calibration for cell in self.cells if cell.method and cell.calibration)
        return {name: self.plan.config.calibrations[name] for name in names}

    def tokens(self, calibration: str) -> int:
        preset = self.plan.config.calibrations[calibration]
        return preset.windows * preset.length

    @cached_property
    def checkpoints(self) -> list[tuple[str, str, str]]:
        """(calibration, method, budget) of every checkpoint."""
        found = [(c.calibration, c.method, c.budget) for c in self.cells if c.calibration and c.method and c.budget]
        return list(dict.fromkeys(found))

    @cached_property
    def fits(self) -> list[tuple[str, str]]:
        """(calibration, method) of all that is fitted."""
        found = [(c.calibration, m) for c in self.cells if c.calibration and c.method for m in self.plan.members[c.method]]
        return list(dict.fromkeys(found))

    @cached_property
    def predicted(self) -> set[tuple[str, str]]:
        """The fits whose losses are predicted."""
        plan = self.plan
        reading = [(c, m) for c, m, b in self.checkpoints if plan.allocation(plan.labels["budgets"][b]).predicts()]
        return {(c, member) for c, method in reading for member in plan.members[method]}

    @cached_property
    def outer(self) -> set[tuple[str, str]]:
        """The fits that include the embeddings and the head."""
        return {(calibration, method) for model, calibration, method in self.plan.cells.outer if model == self.name}

    def fitted(self, method: str) -> list[list[Matrix]]:
        """The groups of matrices that a method fits together, for any calibration."""
        structure, shape = self.plan.structure(self.plan.labels["methods"][method]), self.shape
        outer = shape.outer if any(method == own for _, own in self.outer) else []
        return structure.groups(structure.supported([*shape.matrices, *outer]))

    @cached_property
    def recoveries(self) -> list[tuple[str, str | None, str | None, str]]:
        """(calibration, method, budget, recovery) of every recovery, each step of those that go on from another."""
        found = [
            (c.calibration, c.method, c.budget, step)
            for c in self.cells
            if c.calibration and c.recovery
            for step in self.plan.config.steps(c.recovery)
        ]
        return list(dict.fromkeys(found))

    @cached_property
    def gradients(self) -> set[str]:
        """The calibrations of which statistics of gradients are collected."""
        plan = self.plan
        needing = {c for c, m in self.fits if "gradients" in plan.needs(plan.labels["methods"][m])}
        reading = {c for c, m, _, step in self.recoveries if m and plan.config.recoveries[step].reads_gradients}
        return needing | {c for c, _ in self.predicted} | reading

    @cached_property
    def widest(self) -> int:
        return max(max(m.shape) for m in self.shape.matrices)

    @cached_property
    def largest(self) -> tuple[int, int]:
        """The shape of the matrix of most numbers."""
        return max((m.shape for m in self.shape.matrices), key=math.prod)

    @cached_property
    def gram(self) -> int:
        """Numbers of the second moments of all inputs."""
        return sum(width**2 for width in self.shape.sites().values())

    @cached_property
    def cross(self) -> int:
        """Numbers of the moments of hidden units with the FFN's inputs."""
        return sum(w * self.shape.width for (_, site), w in self.shape.sites().items() if site == "ffn_hidden")

    @cached_property
    def gradient(self) -> int:
        """Numbers of the second moments of gradients in all outputs."""
        return sum(m.shape[0] ** 2 for m in self.shape.matrices)

    @property
    def per_token(self) -> int:
        """Bytes of a token's activations in a forward pass."""
        return (8 * self.shape.width + 4 * self.widest) * self.unit

    @property
    def activations(self) -> float:
        return self.batch_tokens * self.per_token

    @cached_property
    def gradient_of_layer(self) -> tuple[int, int]:
        """(numbers of these moments of the layer that has most, numbers of the largest)"""
        layers: dict[int, int] = {}
        for m in self.shape.matrices:
            layers[m.layer] = layers.get(m.layer, 0) + m.shape[0] ** 2
        return max(layers.values()), max(m.shape[0] ** 2 for m in self.shape.matrices)

    def backward(self, tokens: int) -> float:
        """Bytes that a backward pass of a batch of `tokens` holds."""
        return tokens * (self.per_token * self.shape.layers + 3 * self.shape.vocabulary * 8)

    @property
    def embeddings(self) -> int:
        return self.shape.vocabulary * self.shape.width

    @property
    def read(self) -> float:
        """Bytes of the largest tensor as it is stored."""
        return self.shape.unit * max(self.embeddings, math.prod(self.largest))

    def sides(self, method: str) -> list[tuple[int, int]]:
        """(outputs, inputs) of every group that a method fits together."""
        return [(sum(m.shape[0] for m in g), max(m.shape[1] for m in g)) for g in self.fitted(method)]

    def few(self, calibration: str, method: str) -> list[int]:
        """Widths of the inputs of groups that have few calibration tokens; of an FFN, its input and its hidden units together."""
        tokens = self.tokens(calibration)
        return [n + self.shape.width for _, n in self.sides(method) if too_few(n, tokens)]

    def tuning(self, tuning: Tuning) -> tuple[float, float, Operations]:
        """(memory, disk, operations) of training all weights in float32 on a task's train rows: weights, gradients, two
        moments."""
        task = self.plan.task(tuning.task)
        tokens = tuning.batch * task.length
        held = 4 * tokens * self.shape.layers * (14 * self.shape.width + 3 * self.widest)
        steps = tuning.total_steps(rows_of(task.train))
        operations = Operations(products=6.0 * steps * tokens * self.shape.numbers)
        return 16 * self.shape.numbers + held, 4 * self.shape.numbers, operations
