"""Standard errors of sums over windows: windows are the independent samples, and models are compared per window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from winnow.evaluation.results import PerWindow


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """(sum / count, its standard error with windows as independent clusters), by linearisation of the ratio."""
    s, c = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = float(s.sum() / c.sum())
    n = len(s)
    spread = float(((s - mean * c) ** 2).sum()) * n / (n - 1)
    return mean, math.sqrt(spread) / float(c.sum())


def paired(one: PerWindow, other: PerWindow) -> tuple[float, float]:
    """(difference of the losses of two models in nats per token, its standard error), from their per-window `nll` and
    `tokens`. Raises ValueError if they were scored on other windows."""
    if one["tokens"] != other["tokens"]:
        raise ValueError("the two models were scored on other windows")
    return ratio(np.subtract(one["nll"], other["nll"]).tolist(), one["tokens"])


def tied(difference: float, error: float) -> bool:
    """Whether the difference of two models is within two standard errors of 0."""
    return abs(difference) <= 2 * error


def standing(cells: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[str]:
    """The ranking of the methods of one budget, one line each: `best` or the difference to it, with ties; and `as dense` if the
    loss is within two standard errors of the dense model's."""
    ties = [tied(float(cell["above_best"]), float(cell["above_best_se"])) for cell in cells]
    lines = []
    for cell, tie in zip(cells, ties, strict=True):
        above = f"{float(cell['above_best']):.4f} ± {float(cell['above_best_se']):.4f}"
        line = ("best, tied" if sum(ties) > 1 else "best") if cell is best else above + (", tie" if tie else "")
        lines.append(line + (", as dense" if is_as_dense(cell) else ""))
    return lines


def is_as_dense(cell: Mapping[str, Any]) -> bool:
    """Whether the difference to the dense model's loss is within two standard errors of 0."""
    return tied(float(cell["delta_nll"]), float(cell["delta_nll_se"]))


def over_seeds(values: Sequence[float]) -> float:
    """Standard error of a mean over seeds; NaN for a single seed."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
