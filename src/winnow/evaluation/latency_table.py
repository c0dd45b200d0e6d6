"""The latency table: one row per cell, phase, batch size and prompt, with the cell's and the dense model's numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from winnow.evaluation.machine import ENGINE
from winnow.io.records import Row

if TYPE_CHECKING:
    from winnow.evaluation.results import Timed, TimeResult

COLUMNS = [
    *("model", "calibration", "method", "structure", "metric", "budget", "allocation", "recovery", "evaluation", "targets"),
    *("keep_requested", "keep_bytes", "phase", "batch", "prompt", "verdict", "ratio", "ratio_q1", "ratio_q3"),
    *("ratio_low", "ratio_high", "control_ratio", "control_q1", "control_q3", "repeats", "tokens_per_second"),
    *("dense_tokens_per_second", "seconds", "seconds_q1", "seconds_q3", "dense_seconds", "dense_seconds_q1", "dense_seconds_q3"),
    *("floor_seconds", "dense_floor_seconds", "resident_bytes", "dense_resident_bytes", "peak_bytes", "dense_peak_bytes"),
    *("flops_per_token", "dense_flops_per_token", "weight_bytes_per_token", "dense_weight_bytes_per_token"),
    *("engine", "dtype", "device", "machine", "threads", "load", "bandwidth", "attention", "torch", "checkpoint"),
]


def latency_table(rows: list[Row], results: Mapping[str, TimeResult]) -> pd.DataFrame:
    """One row per case of every cell's result (`row["result"]` names it).

    `ratio` is the time divided by the dense model's in the same repeat (below 1 is faster): median, quartiles, and the 95 %
    interval of the median; `control_*` is the same for the dense model against itself, which is also the row of a dense cell.
    Seconds are per prompt or per decoded step; bytes read and FLOPs (of products with weights) are per token. `floor_seconds` is
    the time in which the measured `bandwidth` (bytes per second) reads the weights once; `resident_bytes` is what the model
    holds after it was used, with what kernels prepare, and in another engine than transformers all memory of its process. There
    the other columns of bytes and FLOPs are empty.
    """
    table = []
    for row in rows:
        result = results[row["result"]]
        machine, protocol = result["machine"], result["protocol"]
        facts = {key: machine[key] for key in ("engine", "device", "threads", "load", "bandwidth", "attention", "torch")} | {
            "machine": machine["name"]
        }
        facts |= {"dtype": protocol["dtype"], "repeats": protocol["repeats"], "checkpoint": result["checkpoint"]}
        for case in result["cases"]:
            dense, control = case["dense"], case["control"]
            own = case.get("compressed") or {**dense, **control}
            ratio = own["ratio"]
            table.append(
                {
                    **row,
                    **facts,
                    "keep_bytes": result["stored_bytes"] / result["dense_bytes"],
                    "phase": case["phase"],
                    "batch": case["batch"],
                    "prompt": case["prompt"],
                    "verdict": own["verdict"],
                    "ratio": ratio["median"],
                    **{f"ratio_{key}": ratio[key] for key in ("q1", "q3", "low", "high")},
                    "control_ratio": control["ratio"]["median"],
                    **{f"control_{key}": control["ratio"][key] for key in ("q1", "q3")},
                    **_measured(own, ""),
                    **_measured(dense, "dense_"),
                }
            )
    frame = pd.DataFrame(table).reindex(columns=COLUMNS)
    return frame.astype({"keep_requested": "float64", "load": "float64"})


def _measured(subject: Timed, prefix: str) -> dict[str, Any]:
    """Columns of the numbers of one model."""
    seconds = subject["seconds"]
    return {
        f"{prefix}tokens_per_second": subject["tokens_per_second"],
        f"{prefix}seconds": seconds["median"],
        f"{prefix}seconds_q1": seconds["q1"],
        f"{prefix}seconds_q3": seconds["q3"],
        f"{prefix}floor_seconds": subject.get("floor_seconds"),
        f"{prefix}resident_bytes": subject.get("resident_bytes"),
        f"{prefix}peak_bytes": subject.get("peak_bytes"),
        f"{prefix}flops_per_token": subject.get("flops"),
        f"{prefix}weight_bytes_per_token": subject.get("weight_bytes"),
    }


def lines(path: Path) -> list[str]:
    """The table as text, one line per row: names, ratio to dense with quartiles, and the verdict."""
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    found = ["time / dense model's time, median [quartiles]; below 1 is faster; `dense` is the dense model against itself"]
    for row in rows:
        what = f"{row['model']} {row['method']} {row['budget']}, {row['phase']}, batch {row['batch']}, prompt {row['prompt']}"
        what += "" if row["engine"] == ENGINE else f", {row['engine']}"
        ratio = f"{float(row['ratio']):.2f} [{float(row['ratio_q1']):.2f}, {float(row['ratio_q3']):.2f}]"
        speed = f"{float(row['tokens_per_second']):,.0f} tokens/s ({float(row['dense_tokens_per_second']):,.0f} dense)"
        found.append(f"{what}: {ratio} {row['verdict']}; {speed}")
    return found
