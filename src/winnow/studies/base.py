"""The interface of a study: cells to evaluate, a measurement of each model's weights and statistics, and a conclusion from
both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from winnow.io.resume import Pieces
from winnow.options import Strict
from winnow.registry import Plugin, Registry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from winnow.evaluation.results import PerWindow
    from winnow.io.artifacts import Bundle
    from winnow.io.records import Row
    from winnow.models.files import ModelFiles
    from winnow.models.shape import Shape
    from winnow.studies.claims import Answer
    from winnow.studies.records import CellRow, LossRow, TimeRow


Item = TypeVar("Item")
NONE = "none"  # the recovery of a cell without one


def key_of(cell: Sequence[str]) -> tuple[str, str, str]:
    """(method, budget, recovery) of a cell of a study."""
    method, budget, *recovery = cell
    return method, budget, recovery[0] if recovery else NONE


def speed(row: TimeRow, unit: float = 1.0) -> Answer:
    """The speed from a row of `winnow.studies.trials.time_forms`, relative to dense times `unit` (100: in %); its 95 % interval
    is taken as two standard errors on each side."""
    from winnow.studies.claims import Answer

    return Answer(unit / row["ratio"], unit * (1 / row["ratio_low"] - 1 / row["ratio_high"]) / 4)


@dataclass(frozen=True)
class Given:
    """The inputs of a measurement on a model; statistics and windows only if they are in the study's `reads`."""

    files: ModelFiles
    dtype: str
    device: str
    moments: Bundle | None = None
    windows: Tensor | None = None  # of the calibration (count, length)
    evaluation: tuple[Tensor, Tensor] | None = None  # ids (count, length) and the first scored token of every window
    checkpoints: dict[tuple[str, str, str], Bundle] = field(default_factory=dict)  # of the study's cells, by `key_of`
    pieces: Pieces = field(default_factory=Pieces)  # what an interrupted job has measured already

    def cut(self, length: int) -> Given:
        """The same with windows of at most `length` tokens."""
        windows = None if self.windows is None else self.windows[:, :length]
        if self.evaluation is None:
            return replace(self, windows=windows)
        ids, first = self.evaluation
        ids, kept = ids[:, :length], first < length  # a window of which nothing is scored any more is left out
        return replace(self, windows=windows, evaluation=(ids[kept], first[kept]))


@dataclass(frozen=True)
class Asked:
    """What a forecast of a measurement needs: the model's shape, bytes of its numbers as it runs, and (windows, tokens of each)
    of the calibration and of the evaluation, whose windows are None if the text decides."""

    shape: Shape
    unit: int
    calibration: tuple[int, int]
    evaluation: tuple[int | None, int]
    checkpoints: int  # of the study's cells

    def forward(self, tokens: float) -> float:
        """Floating-point operations of forward passes."""
        return 2.0 * tokens * self.shape.numbers

    def scored(self, windows: int, length: int) -> int:
        """Tokens of at most so many evaluation windows of at most `length` tokens."""
        return min(windows, self.evaluation[0] or windows) * min(length, self.evaluation[1])

    def logits(self, tokens: float, width: int) -> float:
        """Bytes of logits, as logarithms of `width` bytes in three copies."""
        return 3.0 * tokens * self.shape.vocabulary * width

    @property
    def model(self) -> float:
        """Bytes of the model as it runs."""
        return float(self.shape.numbers * self.unit)


class StudyOptions(Strict):
    """How much a study measures. By default it ends within about an hour on two cores for a model of 135 million numbers."""


LENGTH: Any = Field(
    256, ge=8, description="tokens of a window at most: of longer windows, the first ones are used (costs grow with it)"
)
BATCH = 4096  # tokens of a forward pass
SOLVED = 60.0  # operations of a float32 product that take as long as one of a decomposition in float64, with what is around it


LARGE = 40e6  # numbers of a model beyond which training and losses are on fewer steps and windows by default


def fewer(most: int, numbers: float) -> int:
    """`most`, or for a model of more than 40 million numbers fewer in proportion, at least a tenth: the same arithmetic."""
    return max(most // 10, int(most * min(1.0, LARGE / numbers)))


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly spread, with the first."""
    return list(items[:: max(1, -(-len(items) // most))])


@dataclass(frozen=True)
class Evidence:
    """The inputs of a conclusion: the summary table of the study's cells, their results (by path), the measurements of every
    model (by name), and, if tasks of the study's kind are configured, the table of scores and its cells."""

    summary: pd.DataFrame
    results: dict[str, Any]  # of `winnow.evaluation.results`
    measured: dict[str, Any]  # what its `measure` returns
    scores: pd.DataFrame | None = None
    scored: Sequence[Row] = ()  # the cells in `scores`: model, evaluation, method, budget, recovery, result (a path)

    def cell(self, model: str, method: str, budget: str, recovery: str = NONE) -> CellRow:
        """The summary's row of a cell, with its paired difference to dense. Raises KeyError if there is none. The dense model has
        the budget `dense`."""
        t = self.summary
        same = (t["model"] == model) & (t["method"] == method) & (t["budget"] == budget)
        rows = t[same & (t["recovery"] == recovery)]
        if rows.empty:
            raise KeyError(f"{model}, {method}, {budget}, {recovery}: no such cell")
        return {str(key): value for key, value in rows.iloc[0].items()}  # type: ignore[return-value]

    def loss(self, model: str, *cell: str) -> LossRow:
        """What tables say of the loss of a cell."""
        row = self.cell(model, *cell)
        return {key: row[key] for key in ("keep_bytes", "delta_nll", "delta_nll_se", "perplexity")}  # type: ignore[return-value]

    def windows(self, model: str, cell: Sequence[str]) -> PerWindow:
        """The per-window sums of a cell: (method, budget) or (method, budget, recovery)."""
        return self.results[self.cell(model, *cell)["result"]]["per_window"]

    def above(self, model: str, one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
        """(nats per token of cell `one` above cell `other`, standard error), paired by window; cells as in `windows`."""
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
    methods: ClassVar[dict[str, dict[str, Any]]] = {}  # its own presets; presets of the same content in the config are reused
    budgets: ClassVar[dict[str, dict[str, Any]]] = {}
    recoveries: ClassVar[dict[str, dict[str, Any]]] = {}
    # (method, budget), or (method, budget, recovery); the dense model with the same recovery is added.
    cells: ClassVar[Sequence[tuple[str, ...]]] = []
    scored: ClassVar[Sequence[tuple[str, str]]] = []  # (method, budget) for models with a task of the kind
    scored_by: ClassVar[str] = "classification"  # or `accuracy`: the kind of evaluation
    tables: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[str, ...]] = ()

    # inputs of `measure` besides the model, from moments, windows, evaluation, checkpoints
    reads: ClassVar[tuple[str, ...]] = ()

    Options = StudyOptions

    @classmethod
    def kind(cls) -> str:
        return cls.__module__.split(".")[-2]  # the name of its folder

    def work(self, asked: Asked) -> tuple[float, float]:
        """(bytes of memory beside the process, floating-point operations) of `measure`. Imports no torch."""
        return asked.model, 0.0

    @abstractmethod
    def measure(self, given: Given) -> Mapping[str, Any]:
        """Numbers of one model from its weights, statistics and windows, as builtin types."""

    @abstractmethod
    def conclude(self, evidence: Evidence) -> Conclusion:
        """Tables, figures and answers. Imports no torch."""


STUDIES: Registry[Study] = Registry("winnow.studies", Study, inside="study")


def study_of(name: str, options: Mapping[str, Any] | None = None) -> Study:
    """The study of this name; only its folder is imported, so that no study depends on another's code."""
    cls = STUDIES[name]
    return cls(cls.Options.model_validate(options or {}))
