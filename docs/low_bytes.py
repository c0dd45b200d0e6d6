"""Write docs/results/low_bytes_{loss,divergence,peers}.csv from runs of config/studies/low_bytes.yaml with trained models, and
draw docs/low_bytes.svg from them and from docs/results/quantisers.csv.

python docs/low_bytes.py [results ...]

The rows of a preset are those of the first directory that has it. Without directories only the figure is drawn.
"""

import sys
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
QUANTITIES = {"loss": "delta_nll", "divergence": "kl"}
CELL = ["model", "method", "recovery", "budget"]
MODELS = ["wt2-llama", "wt2-opt", "wt2-gpt2", "wt2-neox", "stories260K", "demo"]
SHOWN = {"winnow": "black", "rounded_gram": "C0", "winnow_factored": "C2", "svd_llm_v2": "C3"}
PACKAGES = {
    "autoround": ("AutoRound", "*", "C1"),
    "gptq": ("GPTQ", "s", "C4"),
    "awq": ("AWQ", "^", "C5"),
    "hqq": ("HQQ", "v", "C6"),
}


def tables(runs: list[Path]) -> None:
    """Write the tables: a row per model, recovery and preset, a column and its error per budget; presets with bytes of their own
    one row each."""
    spread = pd.concat([pd.read_csv(run / "tables" / "spread.csv") for run in runs]).drop_duplicates(CELL)
    spread["model"] = pd.Categorical(spread["model"], MODELS)
    whole = spread["budget"].str.startswith("all-")
    budgets = sorted(spread[whole]["budget"].unique(), reverse=True)
    spread["preset"] = spread["method"] + spread["recovery"].map(lambda name: "" if name == "none" else f", {name}")
    for name, quantity in QUANTITIES.items():
        rows = []
        for (model, preset), cells in spread[whole].groupby(["model", "preset"], observed=True):
            row, cells = {"model": model, "preset": preset, "seeds": int(cells["seeds"].max())}, cells.set_index("budget")
            for budget in budgets:
                found = (cells.loc[budget, quantity], cells.loc[budget, f"{quantity}_se"]) if budget in cells.index else None
                texts = [f"{value:.4f}" for value in found] if found else ["", ""]
                row |= {budget: texts[0], f"{budget} error": texts[1]}
            rows.append(row)
        rows.sort(key=lambda row: (MODELS.index(row["model"]), "," in row["preset"], float(row["all-0.20"] or "inf")))
        pd.DataFrame(rows).to_csv(DOCS / "results" / f"low_bytes_{name}.csv", index=False)
    own = spread[~whole].sort_values(["model", "keep_bytes"], ascending=[True, False])
    shown = own[["model", "preset", "seeds"]].assign(kept=own["keep_bytes"].map("{:.4f}".format))
    for name, quantity in QUANTITIES.items():
        shown[name], shown[f"{name} error"] = own[quantity].map("{:.4f}".format), own[f"{quantity}_se"].map("{:.4f}".format)
    shown.drop_duplicates(["model", "preset", "kept"]).to_csv(DOCS / "results" / "low_bytes_peers.csv", index=False)


def draw() -> None:
    """A panel per model: divergence over the share of the bytes of all block matrices, with two standard errors."""
    rows = pd.read_csv(DOCS / "results" / "low_bytes_divergence.csv").set_index(["model", "preset"])
    packages = pd.read_csv(DOCS / "results" / "quantisers.csv")
    plt.rcParams.update({"svg.hashsalt": "winnow", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 3, figsize=(12, 7))
    columns = [name for name in rows.columns if name.startswith("all-") and not name.endswith(" error")]
    kept = [float(name.removeprefix("all-")) for name in columns]
    for axis, model in zip(axes.flat, MODELS, strict=True):
        for preset, color in SHOWN.items():
            if (model, preset) in rows.index:
                values, errors = (rows.loc[(model, preset), [f"{n}{end}" for n in columns]] for end in ("", " error"))
                style = {"marker": "o", "ms": 3, "color": color, "label": preset}
                axis.errorbar(kept, values.astype(float), 2 * errors.astype(float), **style)
        for package, (name, marker, color) in PACKAGES.items():
            own = packages[(packages["model"] == model) & (packages["quantiser"] == package)]
            own = own.groupby(["bits", "group"])[["kept", "kl"]].mean()
            axis.plot(own["kept"], own["kl"], marker, color=color, ms=7 if marker == "*" else 5, mfc="none", label=name)
        axis.set_title(model, fontsize=9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(0.66, 0.11)
        axis.set_xticks(kept, [f"{share:g}" for share in kept], fontsize=7)
        axis.minorticks_off()
        axis.grid(color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("divergence from the dense model, nats per token", fontsize=9)
    figure.supxlabel("bytes kept of all block matrices (share)", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=8, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(DOCS / "low_bytes.svg", metadata={"Date": None})


if __name__ == "__main__":
    if runs := [Path(name) for name in sys.argv[1:]]:
        tables(runs)
    draw()
