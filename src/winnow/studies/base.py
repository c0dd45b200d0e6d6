"""What a study is: cells to evaluate, a measurement on each model's weights and statistics, and a conclusion from both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.studies.claims import Answer


NONE = "none"  # the recovery of a cell that names none


def key_of(cell: Sequence[str]) -> tuple[str, str, str]:
    """(method, budget, recovery) of a cell as a study names it."""
    method, budget, *recovery = cell
    return method, budget, recovery[0] if recovery else NONE


def speed(row: dict[str, Any], unit: float = 1.0) -> Answer:
    """What a row of `winnow.studies.trials.timed` says of the speed, in times as fast as dense by `unit` (100: in %); its
    interval of 95 % is taken for two standard errors to each side."""
    from winnow.studies.claims import Answer

    return Answer(unit / row["ratio"], unit * (1 / row["ratio_low"] - 1 / row["ratio_high"]) / 4)


@dataclass(frozen=True)
class Given:
    """What a measurement on a model may read: of the statistics and windows, those that the study names in `reads`."""

    files: ModelFiles
    dtype: str
    device: str
    moments: Bundle | None = None
    windows: Tensor | None = None  # of the calibration (count, length)
    evaluation: tuple[Tensor, Tensor] | None = None  # ids (count, length) and the first scored token of every window
    checkpoints: dict[tuple[str, str, str], Bundle] = field(default_factory=dict)  # of the study's cells, by `key_of`


@dataclass(frozen=True)
class Evidence:
    """What a conclusion rests on: the summary table of the study's cells, the results behind it (by path), what was measured on
    every model (by name), and, where tasks of the study's kind are configured, the table of its scores and the cells in it."""

    summary: pd.DataFrame
    results: dict[str, dict[str, Any]]
    measured: dict[str, dict[str, Any]]
    scores: pd.DataFrame | None = None
    scored: Sequence[dict[str, Any]] = ()  # the cells in `scores`: model, evaluation, method, budget, recovery, result (a path)

    def cell(self, model: str, method: str, budget: str, recovery: str = NONE) -> dict[str, Any]:
        """The summary's row of a cell, with its paired difference to dense; KeyError if there is none. The dense model's budget
        is `dense`."""
        t = self.summary
        same = (t["model"] == model) & (t["method"] == method) & (t["budget"] == budget)
        rows = t[same & (t["recovery"] == recovery)]
        if rows.empty:
            raise KeyError(f"{model}, {method}, {budget}, {recovery}: no such cell")
        return {str(key): value for key, value in rows.iloc[0].items()}

    def windows(self, model: str, cell: Sequence[str]) -> dict[str, Any]:
        """What was summed over every window of a cell: (method, budget) or (method, budget, recovery)."""
        return self.results[self.cell(model, *cell)["result"]]["per_window"]

    def above(self, model: str, one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
        """(nats per token of cell `one` above cell `other`, standard error), paired by window; cells as for `windows`."""
        from winnow.evaluation.spread import paired

        return paired(self.windows(model, one), self.windows(model, other))


@dataclass(frozen=True)
class Conclusion:
    """Tables and figures by name, answers by claim and model, and exact identities with their residuals."""

    tables: dict[str, pd.DataFrame]
    figures: dict[str, Figure]
    answers: dict[str, dict[str, Answer]]
    identities: pd.DataFrame = field(repr=False)


class Study(Plugin):
    """The experiments of one paper."""

    title: ClassVar[str]
    reference: ClassVar[str]  # the paper
    methods: ClassVar[dict[str, dict[str, Any]]] = {}  # presets of its own, beside those of the same content in the config
    budgets: ClassVar[dict[str, dict[str, Any]]] = {}
    recoveries: ClassVar[dict[str, dict[str, Any]]] = {}
    # (method, budget), or (method, budget, recovery); beside every recovery stands the dense model with the same.
    cells: ClassVar[Sequence[tuple[str, ...]]] = []
    scored: ClassVar[Sequence[tuple[str, str]]] = []  # (method, budget) on the tasks of models that have one of the kind
    scored_by: ClassVar[str] = "classification"  # or `accuracy`: the kind of evaluation
    tables: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[str, ...]] = ()

    # of moments, windows, evaluation, checkpoints: what `measure` is given beside the model
    reads: ClassVar[tuple[str, ...]] = ()

    Options = Options

    @classmethod
    def kind(cls) -> str:
        return cls.__module__.split(".")[-2]  # a study has no options, and is named by its folder

    @abstractmethod
    def measure(self, given: Given) -> dict[str, Any]:
        """Numbers of one model from its weights, statistics and windows, as builtin types."""

    @abstractmethod
    def conclude(self, evidence: Evidence) -> Conclusion:
        """Tables, figures and answers. Imports no torch."""


STUDIES: Registry[Study] = Registry("winnow.studies", Study, inside="study")


def study_of(name: str) -> Study:
    """The study of a name; its folder alone is imported, so that no study depends on another's code."""
    return STUDIES.build({"kind": name})
