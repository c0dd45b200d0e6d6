"""What a study is: cells to evaluate, a measurement on each model's weights and statistics, and a conclusion from both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from winnow.claims import Answer
    from winnow.io import Bundle
    from winnow.models import ModelFiles


@dataclass(frozen=True)
class Given:
    """What a measurement on a model may read: of the statistics and windows, those that the study names in `reads`."""

    files: ModelFiles
    dtype: str
    device: str
    moments: Bundle | None = None
    windows: Tensor | None = None  # of the calibration (count, length)
    evaluation: tuple[Tensor, Tensor] | None = None  # ids (count, length) and the first scored token of every window


@dataclass(frozen=True)
class Evidence:
    """What a conclusion rests on: the summary table of the study's cells, the results behind it (by path), and what was
    measured on every model (by name)."""

    summary: pd.DataFrame
    results: dict[str, dict[str, Any]]
    measured: dict[str, dict[str, Any]]

    def cell(self, model: str, method: str, budget: str) -> dict[str, Any]:
        """The summary's row of a compressed cell, with its paired difference to dense; KeyError if there is none."""
        t = self.summary
        rows = t[(t["model"] == model) & (t["method"] == method) & (t["budget"] == budget)]
        if rows.empty:
            raise KeyError(f"{model}, {method}, {budget}: no such cell")
        return {str(key): value for key, value in rows.iloc[0].items()}

    def above(self, model: str, one: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
        """(nats per token of cell `one` above cell `other`, standard error), paired by window; cells are (method, budget)."""
        from winnow.spread import paired

        a, b = (self.results[self.cell(model, *cell)["result"]]["per_window"] for cell in (one, other))
        return paired(a, b)


@dataclass(frozen=True)
class Conclusion:
    """Tables and figures by name, answers by claim and model, and exact identities with their residuals."""

    tables: dict[str, pd.DataFrame]
    figures: dict[str, Figure]
    answers: dict[str, dict[str, Answer]]
    identities: pd.DataFrame = field(repr=False)


class Study(ABC):
    """The experiments of one paper."""

    title: ClassVar[str]
    paper: ClassVar[str]
    methods: ClassVar[dict[str, dict[str, Any]]] = {}  # presets of its own, beside those of the same content in the config
    budgets: ClassVar[dict[str, dict[str, Any]]] = {}
    cells: ClassVar[list[tuple[str, str]]] = []  # (method, budget)
    tables: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[str, ...]] = ()

    reads: ClassVar[tuple[str, ...]] = ()  # of moments, windows, evaluation: what `measure` is given beside the model

    @abstractmethod
    def measure(self, given: Given) -> dict[str, Any]:
        """Numbers of one model from its weights, statistics and windows, as builtin types."""

    @abstractmethod
    def conclude(self, evidence: Evidence) -> Conclusion:
        """Tables, figures and answers. Imports no torch."""
