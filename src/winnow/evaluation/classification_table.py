"""The table of classification scores: like that of accuracies, with the recovered dense model as control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from winnow.evaluation.accuracy_table import COLUMNS as OF_ACCURACY
from winnow.evaluation.accuracy_table import accuracy_table
from winnow.evaluation.classification import scores
from winnow.io.records import Row

if TYPE_CHECKING:
    from winnow.evaluation.results import AgainstControl, ClassResult

# As in the other tables, new columns are only appended.
COLUMNS = [*OF_ACCURACY, "delta_control", "delta_control_se"]


def classification_table(rows: list[Row], results: Mapping[str, ClassResult]) -> pd.DataFrame:
    """One row per cell and measure; see `winnow.evaluation.accuracy_table` and `winnow.evaluation.classification.scores`.

    `delta` is the difference to the dense model before compression. `delta_control` of a recovered model is the difference to the
    dense model after the same recovery, paired by row: the cost of compression after equal training.
    """
    controls = {_place(row): results[row["result"]] for row in rows if row["method"] == "dense" and row["recovery"] != "none"}
    found: dict[str, ClassResult] = {}
    for path, row in ((row["result"], row) for row in rows):
        found[path] = result = results[path].copy()
        control = controls.get(_place(row))
        if control is None or row["method"] == "dense":
            continue
        per_row, classes = result["per_row"], len(next(iter(result["tasks"].values()))["labels"])
        beside = scores(per_row["label"], per_row, classes, control["per_row"])
        added: dict[str, AgainstControl] = {
            measure: {"delta_control": score["delta"], "delta_control_se": score["delta_se"]}
            for measure, score in beside.items()
            if "delta" in score
        }
        result["scores"] = {
            task: {measure: {**score, **added.get(measure, {})} for measure, score in measures.items()}
            for task, measures in result["scores"].items()
        }
    return accuracy_table(rows, found, COLUMNS)


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("model", "calibration", "recovery", "evaluation"))
