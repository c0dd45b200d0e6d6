"""Figures of the study of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

STARTS = {
    "dense": "dense model (control)",
    "svd": "SVD",
    "tiers_weight_norm": "tiers by weight norm",
    "tiers_activation": "tiers by activation",
    "asvd": "ASVD",
    "whitened": "SVD-LLM (whitened)",
}
MEASURES = {
    "weights": "error of the weights (share of the squared norm)",
    "activations": "error of the matrices' outputs (share)",
    "blocks": "error of the blocks' outputs (share of what they add)",
    "logits": "KL of the logits, calibration text (nats per token)",
}


def reconstruction_figure(table: pd.DataFrame, published: pd.DataFrame) -> Any:
    """Gain of clusters over one SVD by three rules; a panel per model and number of clusters."""
    from winnow.reporting.figures import axes_grid, line_style, shared_legend

    models, counts = (list(dict.fromkeys(table[key])) if len(table) else [] for key in ("model", "clusters"))
    figure, axes = axes_grid(max(1, len(models) * len(counts)), 4.2, 3.0)
    panels = [(model, count) for model in models for count in counts]
    for axis, (model, count) in zip(axes, panels, strict=False):
        rows = table[(table["model"] == model) & (table["clusters"] == count)]
        for i, by in enumerate(dict.fromkeys(rows["by"])):
            own = rows[rows["by"] == by].sort_values("k")
            style = {**line_style(i), "linestyle": "-"}
            axis.errorbar(
                own["k"], own["equal_bytes"].astype(float), yerr=2 * own["equal_bytes_se"].astype(float),
                label=f"{by}, equal bytes", markersize=4, linewidth=1.1, capsize=2, **style,
            )  # fmt: skip
            style = {**line_style(i), "linestyle": ":", "markerfacecolor": "white"}
            axis.plot(own["k"], own["equal_rank"].astype(float), label=f"{by}, equal rank", markersize=4, linewidth=1.1, **style)
        for name, colour in (("this model", "black"), ("noise", "0.55")):
            one = published[
                (published["model"] == model) & (published["matrices"] == name) & (published["clusters"] == count)
                & (published["k"] == 0.25)
            ]  # fmt: skip
            label = f"published rule at 0.25, {name}"
            axis.plot(one["k"], one["gain"], label=label, marker="*", markersize=9, linestyle="none", color=colour)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xticks([0.25, 0.5, 0.75])
        axis.set_xlim(0.2, 0.8)
        axis.set_title(f"{model}: {count} clusters", fontsize=9)
        axis.set_xlabel("rank k (share of the smaller side)")
        axis.set_ylabel("gain of clusters over one SVD (%)")
    shared_legend(figure, axes, "bars: 2 standard errors\nover matrices")
    return figure


def correlation_figure(errors: pd.DataFrame, budgets: Sequence[str]) -> Any:
    """Loss against every error measure; a panel per model and measure, a marker per budget."""
    from winnow.reporting.figures import axes_grid, line_style, shared_legend
    from winnow.studies.clusters.correlation import spearman

    models = list(dict.fromkeys(errors["model"])) if len(errors) else []
    figure, axes = axes_grid(max(1, len(models) * len(MEASURES)), 4.2, 3.0)
    panels = [(model, measure) for model in models for measure in MEASURES]
    for axis, (model, measure) in zip(axes, panels, strict=False):
        own = errors[(errors["model"] == model) & errors["budget"].str.startswith("ffn")]
        told = []
        for i, budget in enumerate(dict.fromkeys(own["budget"])):
            rows = own[own["budget"] == budget]
            style = {**line_style(i), "linestyle": "none"}
            axis.errorbar(
                rows[measure], rows["delta_nll"], yerr=2 * rows["delta_nll_se"], label=budget, markersize=4, capsize=1.5, **style
            )
            if budget in budgets:
                told.append(f"{budget} {spearman(rows[measure].tolist(), rows['delta_nll'].tolist()):+.2f}")
        axis.locator_params(nbins=5)
        axis.set_title(f"{model}: rank correlation {', '.join(told)}", fontsize=8)
        axis.set_xlabel(MEASURES[measure], fontsize=8)
        axis.set_ylabel("loss above dense (nats per token)", fontsize=8)
    shared_legend(figure, axes, "budget; bars: 2 standard errors")
    return figure


def massive_figure(massive: pd.DataFrame) -> Any:
    """Outlying columns of down, and how well a score ranks the loss of removing columns; two panels per model."""
    from winnow.reporting.figures import axes_grid, line_style, shared_legend

    models = list(dict.fromkeys(massive["model"])) if len(massive) else []
    figure, axes = axes_grid(max(1, 2 * len(models)))
    shown = (("massive", "columns above mean + 5 sigma"), ("left_out", "rank correlation with the KL\nof leaving a column out"))
    panels = [(model, key, label) for model in models for key, label in shown]
    for axis, (model, key, label) in zip(axes, panels, strict=False):
        for i, score in enumerate(dict.fromkeys(massive["score"])):
            rows = massive[(massive["model"] == model) & (massive["score"] == score)].sort_values("layer")
            axis.plot(rows["layer"], rows[key], label=score, markersize=4, linewidth=1.2, **line_style(i))
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_title(f"{model}: columns of down_proj", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylabel(label, fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if key == "massive":
            axis.yaxis.get_major_locator().set_params(integer=True)
    shared_legend(figure, axes, "score of a column")
    return figure


def distillation_figure(table: pd.DataFrame) -> Any:
    """Loss above dense before and after LoRA for every method, and of the dense model after the same LoRA; a panel per model."""
    from winnow.reporting.figures import axes_grid, line_style

    models = list(dict.fromkeys(table["model"]))
    figure, axes = axes_grid(len(models), 5.6, 3.0)
    for axis, model in zip(axes, models, strict=True):
        rows = table[table["model"] == model].sort_values("before", ascending=False).reset_index(drop=True)
        for i, (key, label) in enumerate((("before", "as compressed"), ("after", "after LoRA"))):
            style = {**line_style(i), "linestyle": "none"}
            axis.errorbar(rows[key], rows.index, xerr=2 * rows[f"{key}_se"], label=label, markersize=5, capsize=2, **style)
        for place, row in rows.iterrows():
            axis.plot([row["before"], row["after"]], [place, place], color="0.7", linewidth=1, zorder=0)
        healed = rows.loc[rows["start"] == "dense", "after"].iloc[0]
        axis.axvline(0, color="0.4", linewidth=0.8, linestyle=":")
        axis.axvline(healed, color="0.4", linewidth=0.8, linestyle="--", label="dense model after the same LoRA")
        axis.set_yticks(rows.index, [STARTS[name] for name in rows["start"]], fontsize=8)
        axis.grid(axis="x", linewidth=0.4, color="0.85")
        axis.set_title(f"{model}: LoRA from every start at 0.4 of the FFN's bytes", fontsize=9)
        axis.set_xlabel("loss above the dense model (nats per token); bars: 2 standard errors", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure
