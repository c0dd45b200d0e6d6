"""Write docs/results/low_bytes_{loss,divergence,peers,packages}.csv from docs/results/low_bytes_cells.csv and quantisers.csv, and
draw docs/low_bytes.svg.

python docs/low_bytes.py [results ...]

The rows of `results/tables/spread.csv` of runs of config/studies/low_bytes.yaml with trained models are first put into
low_bytes_cells.csv, in the place of rows of the same cell with at most as many seeds: the study takes hours, and can be run in
parts. Budgets are shares of 16 bits a number, `half-...` those of a model that is stored in 32 bits. A cell that is more than
1 % above its budget is left out.
"""

import math
import sys
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
QUANTITIES = {"loss": "delta_nll", "divergence": "kl"}
CELL = ["model", "method", "recovery", "budget"]
KEPT = [*CELL, "seeds", "keep_bytes", "delta_nll", "delta_nll_se", "kl", "kl_se"]
CELLS = DOCS / "results" / "low_bytes_cells.csv"
BUDGETS = [0.6, 0.4, 0.3, 0.25, 0.22, 0.2, 0.16, 0.14, 0.12]
IN_32_BITS = ["stories260K"]
TRAINED = "refine_50"
SAME = 1.5e-3  # of all bytes, between a package and what `winnow` was asked for
MODELS = ["wt2-llama", "wt2-opt", "wt2-gpt2", "wt2-neox", "stories260K", "demo"]
SHOWN = {"winnow": "black", "rounded_gram": "C0", "winnow_factored": "C2", "svd_llm_v2": "C3"}
PACKAGES = {
    "autoround": ("AutoRound", "*", "C1"),
    "gptq": ("GPTQ", "s", "C4"),
    "awq": ("AWQ", "^", "C5"),
    "hqq": ("HQQ", "v", "C6"),
}


def shown(value: float, error: float) -> tuple[str, str]:
    """Both with four decimals; small ones with the first digit of the error, or two digits."""
    if value <= 0 or value >= 1e-3:
        return f"{value:.4f}", f"{error:.4f}"
    return f"{value:.2g}", f"{error:.1g}"


def collect(runs: list[Path]) -> None:
    """Put the rows of runs into CELLS."""
    found = pd.concat([*(pd.read_csv(run / "tables" / "spread.csv") for run in runs), pd.read_csv(CELLS)])[KEPT]
    found = found[found["method"] != "dense"].sort_values("seeds", ascending=False, kind="stable").drop_duplicates(CELL)
    found.sort_values(CELL).to_csv(CELLS, index=False, float_format="%.8g")


def cells() -> pd.DataFrame:
    """The rows of CELLS: `preset` with its recovery, `share` of 16 bits a number, `bytes` that were asked for, if any."""
    found = pd.read_csv(CELLS)
    found["model"] = pd.Categorical(found["model"], MODELS)
    found["preset"] = found["method"] + found["recovery"].map(lambda name: "" if name == "none" else f", {name}")
    found["share"] = found["keep_bytes"] * found["model"].astype(str).map(lambda model: 2 if model in IN_32_BITS else 1)
    kind, found["bytes"] = found["budget"].str.extract(r"^(all|half)-")[0], found["budget"].str.extract(r"-(0\.\d+)$")[0]
    own = found["model"].astype(str).map(lambda model: "half" if model in IN_32_BITS else "all")
    found.loc[kind != own, "bytes"] = None
    found = found[~(kind.notna() & (kind != own))]  # shares of 32 bits
    return found[found["bytes"].isna() | (found["share"] <= 1.01 * found["bytes"].astype(float))]


def place(order: pd.Series, row: dict[str, object]) -> tuple[int, bool, float, bool]:
    """By which rows are sorted: model, without a recovery first, divergence at 0.22 (`order`), the recommended preset first."""
    cell = row["model"], row["preset"]
    return MODELS.index(str(cell[0])), "," in str(cell[1]), order.get(cell, math.inf), cell[1] != "winnow"


def tables() -> None:
    """Write the tables: a row per model, recovery and preset, a column and its error per budget; presets with bytes of their own
    one row each; and the closest package at the same bytes."""
    found = cells()
    budgets = [f"{share:.2f}" for share in BUDGETS]
    for name, quantity in QUANTITIES.items():
        rows = []
        for (model, preset), own in found[found["bytes"].isin(budgets)].groupby(["model", "preset"], observed=True):
            row, own = {"model": model, "preset": preset, "seeds": int(own["seeds"].max())}, own.set_index("bytes")
            for share in budgets:
                values = shown(own.loc[share, quantity], own.loc[share, f"{quantity}_se"]) if share in own.index else ("", "")
                row |= {share: values[0], f"{share} error": values[1]}
            rows.append(row)
        order = found[found["bytes"] == "0.22"].set_index(["model", "preset"])["kl"]
        rows.sort(key=partial(place, order))
        pd.DataFrame(rows).to_csv(DOCS / "results" / f"low_bytes_{name}.csv", index=False)
    own = found[found["bytes"].isna()].sort_values(["model", "share"], ascending=[True, False])
    peers = own[["model", "preset", "seeds"]].assign(kept=own["share"].map("{:.4f}".format))
    for name, quantity in QUANTITIES.items():
        pairs = [shown(*pair) for pair in zip(own[quantity], own[f"{quantity}_se"], strict=True)]
        peers[name], peers[f"{name} error"] = zip(*pairs, strict=True) if pairs else ([], [])
    peers.drop_duplicates(["model", "preset", "kept"]).to_csv(DOCS / "results" / "low_bytes_peers.csv", index=False)
    beside(found[found["bytes"].notna() & ~found["bytes"].isin(budgets)])


def beside(found: pd.DataFrame) -> None:
    """Write the table of the closest package at the bytes that `winnow` was asked for."""
    packages = pd.read_csv(DOCS / "results" / "quantisers.csv")
    every = packages.groupby(["model", "quantiser", "bits", "group"])[["kept", "kl", "kl_error"]].mean().reset_index()
    trained = found[(found["recovery"] == TRAINED) & (found["method"] == "winnow")].set_index(["model", "bytes"])
    rows = []
    for row in found[found["recovery"] == "none"].sort_values(["model", "bytes"], ascending=[True, False]).itertuples():
        near = every[(every["model"] == row.model) & ((every["kept"] - float(row.bytes)).abs() < SAME)]
        if row.method == "winnow" and len(near):
            best = near.loc[near["kl"].idxmin()]
            own, theirs = shown(row.kl, row.kl_se), shown(best["kl"], best["kl_error"])
            called = f"{PACKAGES[best['quantiser']][0]}, {best['bits']:.0f} bits, groups of {best['group']:.0f}"
            rows.append({"model": row.model, "bytes": row.bytes, "package": called})
            rows[-1] |= {"its divergence": theirs[0], "its divergence error": theirs[1]}
            rows[-1] |= {"winnow": own[0], "winnow error": own[1], "winnow over it": f"{row.kl / best['kl']:.2f}"}
            if (row.model, row.bytes) in trained.index:
                after = trained.loc[(row.model, row.bytes)]
                value, error = shown(after["kl"], after["kl_se"])
                rows[-1] |= {"trained": value, "trained error": error, "trained over it": f"{after['kl'] / best['kl']:.2f}"}
    pd.DataFrame(rows).to_csv(DOCS / "results" / "low_bytes_packages.csv", index=False)


def draw() -> None:
    """A panel per model: divergence over the share of the bytes of all block matrices, with two standard errors."""
    rows = pd.read_csv(DOCS / "results" / "low_bytes_divergence.csv").set_index(["model", "preset"])
    packages = pd.read_csv(DOCS / "results" / "quantisers.csv")
    plt.rcParams.update({"svg.hashsalt": "winnow", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 3, figsize=(12, 7))
    columns = [f"{share:.2f}" for share in BUDGETS]
    for axis, model in zip(axes.flat, MODELS, strict=True):
        for preset, color in SHOWN.items():
            if (model, preset) in rows.index:
                values, errors = (rows.loc[(model, preset), [f"{n}{end}" for n in columns]] for end in ("", " error"))
                style = {"marker": "o", "ms": 3, "color": color, "label": preset}
                axis.errorbar(BUDGETS, values.astype(float), 2 * errors.astype(float), **style)
        for package, (name, marker, color) in PACKAGES.items():
            own = packages[(packages["model"] == model) & (packages["quantiser"] == package)]
            own = own.groupby(["bits", "group"])[["kept", "kl"]].mean()
            axis.plot(own["kept"], own["kl"], marker, color=color, ms=7 if marker == "*" else 5, mfc="none", label=name)
        axis.set_title(model, fontsize=9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(0.66, 0.11)
        axis.set_xticks(BUDGETS, [f"{share:g}" for share in BUDGETS], fontsize=6)
        axis.minorticks_off()
        axis.grid(color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("divergence from the dense model, nats per token", fontsize=9)
    figure.supxlabel("bytes kept of all block matrices (share)", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=8, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0.015, 0, 1, 0.95))
    figure.savefig(DOCS / "low_bytes.svg", metadata={"Date": None})


if __name__ == "__main__":
    if runs := [Path(name) for name in sys.argv[1:]]:
        collect(runs)
    tables()
    draw()
