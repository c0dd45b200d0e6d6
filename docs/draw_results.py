"""Draw docs/models.svg: losses of some presets on the trained models, from docs/results/models.csv.

python docs/draw_results.py
"""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ["svd", "asvd", "whitened", "basis_sharing", "svd_llm_v2", "whitened_learned", "winnow_factored", "winnow"]
LINEAR = 1e-3  # nats below which the axis is linear: losses near 0 have both signs


def main() -> None:
    """A panel per model: loss over the share of the bytes of all block matrices, with two standard errors."""
    rows = pd.read_csv(ROOT / "docs" / "results" / "models.csv").set_index(["model", "preset"])
    models = list(dict.fromkeys(rows.index.get_level_values("model")))
    plt.rcParams.update({"svg.hashsalt": "winnow", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, len(models), figsize=(12, 3.8), sharey=True)
    columns = [name for name in rows.columns if name.startswith("all-") and not name.endswith(" error")]
    kept = [float(name.removeprefix("all-")) for name in columns]
    for axis, model in zip(axes, models, strict=True):
        for number, preset in enumerate(SHOWN):
            losses, errors = (rows.loc[(model, preset), [f"{name}{end}" for name in columns]] for end in ("", " error"))
            style = {"marker": "o", "ms": 3, "color": "black" if preset == "winnow" else f"C{number}", "label": preset}
            axis.errorbar(kept, losses.astype(float), 2 * errors.astype(float), **style)
        axis.set_title(model, fontsize=9)
        axis.set_yscale("symlog", linthresh=LINEAR)
        axis.invert_xaxis()
        axis.set_xticks(kept)
        axis.grid(axis="y", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss above dense, nats per token")
    figure.supxlabel("bytes kept of all block matrices (share)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(SHOWN), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(ROOT / "docs" / "models.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
