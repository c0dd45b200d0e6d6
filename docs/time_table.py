"""Write docs/results/time.csv from a run of config/studies/time.yaml: the loss at every bound on the time of the products.

python docs/time_table.py [results]
"""

import csv
import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def main(results: Path) -> None:
    """A row per bound: time and stored bytes over those of the dense matrices, and losses in nats per token."""
    rows = []
    for row in pd.read_csv(results / "tables" / "summary.csv").query("method != 'dense'").itertuples():
        found = json.loads((results.parent / row.checkpoint).parent.joinpath("allocation.json").read_text(encoding="utf-8"))
        bound = found["budget"]["allocation"]["time"]
        time = (
            {"time.keep": bound["keep"], "time": f"{found['time']['keep']:.3f}"} if bound else {"time.keep": "none", "time": ""}
        )
        loss = {"loss": f"{row.delta_nll:.4f}", "loss error": f"{row.delta_nll_se:.4f}", "divergence": f"{row.kl:.4f}"}
        rows.append({**time, "bytes": f"{row.keep_bytes:.3f}", "predicted": f"{found['value']:.4f}", **loss})
    rows.sort(key=lambda row: str(row["time.keep"]), reverse=True)
    with open(ROOT / "docs" / "results" / "time.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results"))
