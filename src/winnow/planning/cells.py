"""What is measured: the cells of experiments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from os.path import isfile  # unlike Path's, it takes names that no file can have
from typing import Any

from winnow.data.text_formats import has_objects
from winnow.errors import InputError
from winnow.evaluation.base import EVALUATIONS, PLAIN
from winnow.evaluation.kinds.perplexity import Perplexity
from winnow.models.architectures import reaches_outer
from winnow.planning.config import Experiment
from winnow.planning.labels import Labels


@dataclass(frozen=True)
class Cell:
    """One evaluated point, as preset names. `method` is None for the dense model, and so are its upstream choices; with a
    recovery, which needs a calibration, it is the dense model after the same recovery: the control of recovered cells."""

    model: str
    evaluation: str
    calibration: str | None = None
    method: str | None = None
    budget: str | None = None
    recovery: str | None = None
    kind: str = PLAIN  # of the evaluation


class Cells:
    """All cells of a configuration, dense ones first."""

    def __init__(self, presets: Labels):
        self.presets = presets
        self._cells = self._of_experiments()

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Cell:
        return self._cells[index]

    def of(self, kind: str) -> list[Cell]:
        """The cells whose evaluation is of this kind, dense ones first."""
        return [cell for cell in self if cell.kind == kind]

    def _of_experiments(self) -> list[Cell]:
        """Cells of all experiments, each once: the dense ones first, then those after the same recovery."""
        dense: dict[Cell, None] = {}
        healed: dict[Cell, None] = {}
        compressed: dict[Cell, None] = {}
        for e in self.presets.config.experiments.values():
            for model, evaluation in product(e.models, e.evaluations):
                dense[Cell(model, evaluation, kind=self.presets.config.evaluations[evaluation].kind)] = None
            recoveries = [name for name in e.recoveries if self.presets.recovers(name)]
            for model, evaluation, calibration, recovery in product(
                e.models, e.evaluations, self.presets.seeds(e.calibrations), recoveries
            ):
                kind = self.presets.config.evaluations[evaluation].kind
                if EVALUATIONS[kind].recovered:
                    healed[Cell(model, evaluation, calibration, recovery=recovery, kind=kind)] = None
            methods = [name for m in e.methods for name in (m, self.presets.controls.get(m) if e.controls else None) if name]
            seeds = self.presets.seeds(e.calibrations)
            for m, ev, c, method, b, r in product(e.models, e.evaluations, seeds, methods, e.budgets, e.recoveries):
                kind = self.presets.config.evaluations[ev].kind
                compressed[Cell(m, ev, c, method, self.presets.spread_by(method, b), r, kind)] = None
        return [*dense, *healed, *compressed]

    def exported(self) -> list[Cell]:
        """Cells whose checkpoints are asked for as dense models: the methods that are named, not their controls."""
        return [cell for e in self.presets.config.experiments.values() if e.export == "dense" for cell in self.asked(e)]

    def asked(self, e: Experiment) -> list[Cell]:
        rows = product(e.models, e.evaluations, self.presets.seeds(e.calibrations), e.methods, e.budgets, e.recoveries)
        return [Cell(*row[:4], self.presets.spread_by(row[3], row[4]), *row[5:]) for row in rows]

    def check_sources(self) -> None:
        """Raise InputError for a local model, text or file of a task that an experiment uses and that is not there, and for rows
        of JSON that would be read as plain text."""
        for name in dict.fromkeys(cell.model for cell in self):
            label = self.presets.labels["models"][name]
            self.presets.local_model_files(label)
            if self.presets.config.models[name].stored_dtype and not self.presets.dequantized(label):
                raise InputError(f"models.{name}.stored_dtype: is for the weights of a GGUF file; remove it")
        for name in dict.fromkeys(text for cell in self for text in self.texts_of(cell)):
            text = self.presets.config.texts[name]
            for file in text.files:
                if not isfile(file):
                    raise InputError(f"texts.{name}.files: {file}: there is no such file")
                if (text.format == "lines" or "format" not in text.model_fields_set) and has_objects(file):
                    raise InputError(
                        f"texts.{name}: {file}: its lines are JSON objects; say `format: jsonl` to read a column of them, or "
                        "`format: raw` if braces and keys are part of the text"
                    )
        for name in dict.fromkeys(cell.evaluation for cell in self.of("accuracy")):
            self.presets.task_files(self.presets.labels["evaluations"][name])
        for name in dict.fromkeys(name for cell in self for name in self.tasks_of(cell)):
            for file in [*self.presets.task(name).train, *self.presets.task(name).test]:
                if not isfile(file):
                    raise InputError(f"evaluations.{name}: {file}: there is no such file")

    def texts_of(self, cell: Cell) -> list[str]:
        """Names of the texts that a cell reads: of its evaluation, if it has one, and of its calibration."""
        evaluation = self.presets.config.evaluations[cell.evaluation]
        texts = [evaluation.text] if isinstance(evaluation, Perplexity.Options) else []
        calibration = self.presets.config.calibrations[cell.calibration].text if cell.calibration else None
        return [*texts, *([calibration] if calibration else [])]

    def tasks_of(self, cell: Cell) -> list[str]:
        """Names of the classification tasks whose rows a cell reads: to score, to tune, or to calibrate on."""
        parts: list[Any] = [self.presets.config.models[cell.model].finetune]
        parts += [self.presets.config.calibrations[cell.calibration]] if cell.calibration else []
        parts += (
            [self.presets.config.recoveries[step] for step in self.presets.config.steps(cell.recovery)] if cell.recovery else []
        )
        named = [getattr(part, "task", None) for part in parts]
        return [name for name in [cell.evaluation if cell.kind == "classification" else None, *named] if name]

    @cached_property
    def outer(self) -> list[tuple[str, str, str]]:
        """(model, calibration, method), by name, of the methods whose factors include the embeddings and the head: those of
        budgets that target them, and their members."""
        budgets = self.presets.config.budgets
        found = [
            (cell.model, cell.calibration, member)
            for cell in self
            if cell.calibration and cell.method and cell.budget and reaches_outer(budgets[cell.budget].targets)
            for member in (cell.method, *self.presets.members[cell.method])
        ]
        return list(dict.fromkeys(found))

    @cached_property
    def _outer(self) -> set[tuple[str, ...]]:
        sections = ("models", "calibrations", "methods")
        return {tuple(self.presets.labels[s][name] for s, name in zip(sections, names, strict=True)) for names in self.outer}

    def has_outer(self, model: str, calibration: str, method: str) -> bool:
        """The same by labels."""
        return (model, calibration, method) in self._outer

    def reads_moments(self, cell: Cell) -> bool:
        """Whether second moments of inputs are in a cell: in its factors, or in the losses that its bytes are spread by."""
        if cell.method is None:
            return False
        members = (self.presets.labels["methods"][member] for member in self.presets.members[cell.method])
        predicts = self.presets.allocation(self.presets.labels["budgets"][str(cell.budget)]).predicts()
        return predicts or any("moments" in self.presets.needs(member) for member in members)
