"""Rank correlations of a few pairs, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The rank correlation, ties with their mean rank; NaN if one side is constant."""
    import pandas as pd

    a, b = (pd.Series(list(values), dtype="float64").rank() for values in (one, other))
    return float(a.corr(b))


def jackknife(statistic: Callable[[list[int]], float], count: int) -> tuple[float, float]:
    """(the statistic of all `count` items, its standard error by the leave-one-out jackknife); `statistic` takes indices."""
    items = list(range(count))
    left = np.array([statistic(items[:i] + items[i + 1 :]) for i in items])
    error = math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    return statistic(items), error


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error over the values; 0 for a single one)."""
    if len(values) < 2:
        return float(values[0]), 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
