"""The summary table with one row per evaluated cell, and the table over calibration seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from winnow.evaluation.spread import over_seeds, paired, tied
from winnow.io.records import Row

if TYPE_CHECKING:
    from winnow.evaluation.results import LossResult, PerWindow

# Other people's tools read these columns. New ones are only appended.
COLUMNS = [
    *("model", "calibration", "method", "structure", "metric", "budget", "allocation", "recovery", "evaluation"),
    *("keep_requested", "dense_bytes", "stored_bytes", "keep_bytes", "model_dense_bytes", "model_stored_bytes"),
    *("windows", "tokens", "nll", "nll_se", "perplexity", "delta_nll", "delta_nll_se", "kl", "top1_agreement"),
    *("checkpoint", "targets"),
]
SPREAD = [
    *("model", "calibration", "method", "structure", "metric", "budget", "allocation", "recovery", "evaluation", "targets"),
    *("keep_bytes", "seeds", "delta_nll", "delta_nll_seed_se", "delta_nll_window_se", "delta_nll_se"),
    *("best", "above_best", "above_best_seed_se", "above_best_window_se", "above_best_se", "tie"),
    *("kl", "kl_seed_se", "kl_window_se", "kl_se"),
    *("closest", "above_closest", "above_closest_seed_se", "above_closest_window_se", "above_closest_se", "tie_kl"),
]
ERRORS = ("", "_seed_se", "_window_se", "_se")
UNCHANGED = {"delta_nll": 0.0, "delta_nll_se": 0.0, "kl": 0.0, "top1_agreement": 1.0}  # of the dense model itself


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the dense model without a recovery."""
    return row["method"] == "dense" and row["recovery"] == "none"


def summary(rows: list[Row], results: Mapping[str, LossResult]) -> pd.DataFrame:
    """One row per cell: its names (from `rows`) and its numbers (from the result `row["result"]`).

    Losses are in nats per token, bytes are those of the compressed matrices (`dense_bytes`, `stored_bytes`) and of the
    whole model. `keep_requested` is empty if the budget is a rank.
    """
    table = []
    for row in rows:
        result = results[row["result"]]
        measured = {key: value for key, value in result.items() if key in COLUMNS}
        own = UNCHANGED if is_dense(row) else {}
        table.append({**row, **measured, **own, "keep_bytes": result["stored_bytes"] / result["dense_bytes"]})
    frame = pd.DataFrame(table).reindex(columns=COLUMNS)
    return frame.astype({"keep_requested": "float64", "kl": "float64", "top1_agreement": "float64"})


def spread(rows: list[Row], results: Mapping[str, LossResult]) -> pd.DataFrame:
    """One row per compressed configuration, aggregated over calibration seeds.

    `delta_nll` (nats per token above dense) and `keep_bytes` are means over seeds. `above_best` is the difference to the
    method with the lowest `delta_nll` of the same model, calibration, budget, recovery and evaluation, paired by seed and by
    window. Each difference has the standard errors `_seed_se` over seeds (empty with one seed), `_window_se` over windows after
    averaging the seeds in each window, and `_se`, the root of the sum of their squares: seeds and windows are crossed, so each
    misses the variance of the other, and the sum counts their interaction twice, which is conservative. `tie`: 0 is within two
    `_se` of the difference. `kl`, `closest`, `above_closest` and `tie_kl` are the same for the divergence from the dense model,
    empty where an evaluation has none.
    """
    dense = {(row["model"], row["evaluation"]): results[row["result"]] for row in rows if is_dense(row)}
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}  # by what is compared, then by method
    for row in rows:
        if row["method"] != "dense":
            key = tuple(row[name] for name in ("model", "seeds_of", "budget", "recovery", "evaluation"))
            cell = cells.setdefault(key, {}).setdefault(row["method"], {"row": row, "seeds": {}})
            cell["seeds"][row["seed"]] = results[row["result"]]
    table = []
    for (model, _, _, _, evaluation), methods in cells.items():
        base = dense[model, evaluation]["per_window"]
        by_loss = {name: {seed: r["per_window"] for seed, r in cell["seeds"].items()} for name, cell in methods.items()}
        losses = _compared(by_loss, base, ("delta_nll", "best", "above_best", "tie"))
        by_kl = {name: {seed: _divergences(windows) for seed, windows in seeds.items()} for name, seeds in by_loss.items()}
        if all("kl" in windows for seeds in by_loss.values() for windows in seeds.values()):
            zero: PerWindow = {"nll": [0.0] * len(base["nll"]), "tokens": base["tokens"]}
            for name, found_kl in _compared(by_kl, zero, ("kl", "closest", "above_closest", "tie_kl")).items():
                losses[name] |= found_kl
        for name, cell in methods.items():
            found = list(cell["seeds"].values())
            own = {"calibration": cell["row"]["seeds_of"], "seeds": len(found)}
            own["keep_bytes"] = float(np.mean([r["stored_bytes"] / r["dense_bytes"] for r in found]))
            table.append({**cell["row"], **own, **losses[name]})
    return pd.DataFrame(table, columns=SPREAD)


def _divergences(windows: PerWindow) -> PerWindow:
    """The divergences of windows in the place of their losses."""
    return {"nll": windows.get("kl", []), "tokens": windows["tokens"]}


def _compared(
    methods: dict[str, dict[int, PerWindow]], base: PerWindow, names: tuple[str, str, str, str]
) -> dict[str, dict[str, Any]]:
    """{method: its columns}: above `base`, which is the best method, above that one, and whether they are tied; by `names`."""
    value, first, above_first, tie = names
    above = {name: _above(seeds, dict.fromkeys(seeds, base)) for name, seeds in methods.items()}
    best = min(above, key=lambda name: above[name][0])
    rows: dict[str, dict[str, Any]] = {}
    for name, seeds in methods.items():
        to_best = _above(seeds, methods[best])
        rows[name] = {f"{value}{end}": number for end, number in zip(ERRORS, above[name], strict=True)} | {first: best}
        rows[name] |= {f"{above_first}{end}": number for end, number in zip(ERRORS, to_best, strict=True)}
        rows[name][tie] = tied(to_best[0], to_best[3])
    return rows


def _above(seeds: dict[int, PerWindow], others: dict[int, PerWindow]) -> tuple[float, float, float, float]:
    """(mean over seeds of the paired difference of losses; its standard errors over seeds, over windows, and combined)."""
    differences = [paired(windows, others[seed])[0] for seed, windows in seeds.items()]
    own, other = (
        np.mean([of["nll"] for of in each], axis=0).tolist() for each in (seeds.values(), [others[seed] for seed in seeds])
    )
    tokens = next(iter(others.values()))["tokens"]
    _, of_windows = paired({"nll": own, "tokens": tokens}, {"nll": other, "tokens": tokens})
    of_seeds = over_seeds(differences)
    both = math.hypot(of_windows, 0.0 if math.isnan(of_seeds) else of_seeds)
    return float(np.mean(differences)), of_seeds, of_windows, both
