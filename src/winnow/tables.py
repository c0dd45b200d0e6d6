"""The summary table: one row per evaluated cell, columns as contracted."""

from __future__ import annotations

from typing import Any

import pandas as pd

# Contract: other people's tools read these columns. New ones are appended.
COLUMNS = [
    *("model", "calibration", "method", "structure", "metric", "budget", "allocation", "recovery", "evaluation"),
    *("keep_requested", "dense_bytes", "stored_bytes", "keep_bytes", "model_dense_bytes", "model_stored_bytes"),
    *("windows", "tokens", "nll", "nll_se", "perplexity", "delta_nll", "delta_nll_se", "kl", "top1_agreement"),
    *("checkpoint", "targets"),
]
DENSE = {"delta_nll": 0.0, "delta_nll_se": 0.0, "kl": 0.0, "top1_agreement": 1.0}  # of the dense model to itself


def summary(rows: list[dict[str, Any]], results: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per cell: its names (from `rows`) and its numbers (from the result that `row["result"]` names).

    Losses are nats per token, bytes are those of the compressed matrices (`dense_bytes`, `stored_bytes`) and of the
    whole model. `keep_requested` is empty where the budget is a rank.
    """
    table = []
    for row in rows:
        result = results[row["result"]]
        measured = {key: result[key] for key in COLUMNS if key in result}
        own = DENSE if row["method"] == "dense" else {}
        table.append({**row, **measured, **own, "keep_bytes": result["stored_bytes"] / result["dense_bytes"]})
    frame = pd.DataFrame(table).reindex(columns=COLUMNS)
    return frame.astype({"keep_requested": "float64", "kl": "float64", "top1_agreement": "float64"})
