"""Write docs/results/runtime.csv from a run of config/studies/runtime.yaml: what every runtime costs, paired by window.

python docs/runtime_table.py [results]

Rows `loss`: the loss above the dense model, nats per token, and rows `divergence`: KL(dense || compressed), both of the programme
without a restriction; rows `loss more` and `divergence more`: what these rise by with the restriction.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from winnow.evaluation.spread import paired

ROOT = Path(__file__).resolve().parents[1]
FREE = {"any": ["torch", "vllm", "compressed-tensors", "gguf"]}  # method: the restricted ones
QUANTITIES = {"loss": "nll", "divergence": "kl"}


def difference(one: dict, other: dict | None, key: str) -> tuple[float, float]:
    """(difference of a quantity of two models, its standard error), per token; of one model alone, its mean."""
    zeros = {key: np.zeros(len(one["tokens"])).tolist(), "tokens": one["tokens"]}
    own, others = ({"nll": windows[key], "tokens": windows["tokens"]} for windows in (one, other or zeros))
    return paired(own, others)


def main(results: Path) -> None:
    """A row per model, quantity and runtime, with a column and its error per budget."""
    summary = pd.read_csv(results / "tables" / "summary.csv")
    folder, rows = results.parent, []
    windows = {}
    for row in summary.itertuples():
        beside = (folder / row.checkpoint).parent.glob("none-*/*.json")
        if row.method == "dense":
            beside = results.glob(f"{row.model}-*/dense/*.json")
        windows[row.model, row.method, row.budget] = json.loads(next(beside).read_text(encoding="utf-8"))["per_window"]
    for model in dict.fromkeys(summary.model):
        budgets = sorted({budget for own, _, budget in windows if own == model} - {"dense"}, reverse=True)
        for free, restricted in FREE.items():
            for quantity, key in QUANTITIES.items():
                dense = windows[model, "dense", "dense"] if key == "nll" else None
                lines = {(quantity, free): {b: difference(windows[model, free, b], dense, key) for b in budgets}}
                for method in restricted:
                    pairs = {b: (windows[model, method, b], windows[model, free, b]) for b in budgets}
                    lines[f"{quantity} more", method] = {b: difference(*pair, key) for b, pair in pairs.items()}
                for (what, method), cells in lines.items():
                    values = {
                        f"{b}{end}": f"{v:.4f}" for b, pair in cells.items() for end, v in zip(("", " error"), pair, strict=True)
                    }
                    rows.append({"model": model, "quantity": what, "method": method, **values})
    with open(ROOT / "docs" / "results" / "runtime.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results"))
