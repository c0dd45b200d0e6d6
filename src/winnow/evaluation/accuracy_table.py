"""The table of accuracies: one row per evaluated cell, task and measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from winnow.io.records import Row

if TYPE_CHECKING:
    from winnow.evaluation.results import ScoreResult

# Other people's tools read these columns, as those of the summary. New ones are only appended.
COLUMNS = [
    *("model", "calibration", "method", "structure", "metric", "budget", "allocation", "recovery", "evaluation"),
    *("keep_requested", "dense_bytes", "stored_bytes", "keep_bytes", "model_dense_bytes", "model_stored_bytes"),
    *("task", "measure", "documents", "value", "value_se", "delta", "delta_se", "checkpoint", "targets"),
]


def accuracy_table(rows: list[Row], results: Mapping[str, ScoreResult], columns: list[str] = COLUMNS) -> pd.DataFrame:
    """One row per cell, task and measure: the cell's names (from `rows`), its bytes, and its scores.

    `delta` is the score minus the dense model's, paired by document; 0 for the dense model. Standard errors are empty if lm-eval
    has none, and `delta_se` is empty if the measure is not a mean over documents.
    """
    table = []
    for row in rows:
        result = results[row["result"]]
        sizes: dict[str, Any] = {key: value for key, value in result.items() if key in COLUMNS}
        sizes["keep_bytes"] = result["stored_bytes"] / result["dense_bytes"]
        for task, measures in result["scores"].items():
            for measure, score in measures.items():
                own = {"delta": 0.0, "delta_se": 0.0} if (row["method"], row["recovery"]) == ("dense", "none") else {}
                documents = result["tasks"][task]["documents"]
                table.append({**row, **sizes, "task": task, "measure": measure, "documents": documents, **own, **score})
    frame = pd.DataFrame(table).reindex(columns=columns)
    numbers = [key for key in columns if key.startswith(("keep_requested", "value", "delta"))]
    return frame.astype(dict.fromkeys(numbers, "float64"))
