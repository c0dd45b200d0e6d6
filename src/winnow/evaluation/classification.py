"""Scores of a classifier with standard errors, and paired differences to the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from winnow.errors import InputError
from winnow.evaluation.spread import ratio

if TYPE_CHECKING:
    from winnow.evaluation.results import PerRow, Scores

Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], float]  # of (labels, predictions, count of each pair)


def _confusion(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> tuple[float, float, float, float]:
    """Counts of the (label, prediction) pairs (1, 1), (0, 1), (1, 0) and (0, 0), for two classes."""
    counts = [float(weights[(labels == label) & (predicted == found)].sum()) for found in (1, 0) for label in (1, 0)]
    return counts[0], counts[1], counts[2], counts[3]


def _f1(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    right, false, missed, _ = _confusion(labels, predicted, weights)
    return 2 * right / (2 * right + false + missed) if right else 0.0


def _matthews(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    right, false, missed, other = _confusion(labels, predicted, weights)
    square = (right + false) * (right + missed) * (other + false) * (other + missed)
    return (right * other - false * missed) / math.sqrt(square) if square else 0.0


def _jackknife(labels: np.ndarray, own: list[int], measure: Measure, minus: list[int] | None = None) -> tuple[float, float]:
    """(measure of the predictions `own`, minus that of `minus`; its standard error) by the leave-one-out jackknife, computed once
    for all rows with the same label and predictions."""
    table = np.stack([labels, own, *([] if minus is None else [minus])], axis=1)
    cells, counts = np.unique(table, axis=0, return_counts=True)

    def value(weights: np.ndarray) -> float:
        less = 0.0 if minus is None else measure(cells[:, 0], cells[:, 2], weights)
        return measure(cells[:, 0], cells[:, 1], weights) - less

    n = len(table)
    without = np.array([value(counts - np.eye(len(cells), dtype=int)[i]) for i in range(len(cells))])
    mean = float((counts * without).sum() / n)
    return value(counts), math.sqrt((n - 1) / n * float((counts * (without - mean) ** 2).sum()))


def scores(labels: list[int], own: PerRow, classes: int, dense: PerRow | None = None) -> Scores:
    """{measure: {value, value_se, and with the dense model's outputs `dense` delta, delta_se}}.

    Accuracy and loss (nats) are means over rows, with the standard error of a mean; `agreement` is the share of rows with the
    same class as the dense model's. F1 of class 1 and Matthews' correlation, for two classes, have the jackknife standard error
    over rows. `delta` is the difference to the dense model, paired by row. Raises InputError if it was scored on other rows.
    """
    if dense is not None and len(dense["predicted"]) != len(labels):
        raise InputError("the dense model was scored on other rows; delete its result and run again")
    answers, ones = np.array(labels), [1.0] * len(labels)
    values = {"accuracy": np.equal(own["predicted"], answers).astype(float), "loss": np.array(own["loss"])}
    others = {}
    if dense is not None:
        others = {"accuracy": np.equal(dense["predicted"], answers).astype(float), "loss": np.array(dense["loss"])}
    found: Scores = {}
    for name, per_row in values.items():
        value, error = ratio(per_row.tolist(), ones)
        found[name] = {"value": value, "value_se": error}
        if others:
            found[name]["delta"], found[name]["delta_se"] = ratio((per_row - others[name]).tolist(), ones)
    measures: dict[str, Measure] = {"f1": _f1, "matthews": _matthews} if classes == 2 else {}
    for name, measure in measures.items():
        value, error = _jackknife(answers, own["predicted"], measure)
        found[name] = {"value": value, "value_se": error}
        if dense is not None:
            delta = _jackknife(answers, own["predicted"], measure, dense["predicted"])
            found[name]["delta"], found[name]["delta_se"] = delta
    if dense is not None:
        same = np.equal(own["predicted"], dense["predicted"]).astype(float)
        value, error = ratio(same.tolist(), ones)
        found["agreement"] = {"value": value, "value_se": error}
    return found
