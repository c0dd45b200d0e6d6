"""Figures of the study of bypasses, from its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from winnow.models.architectures import ROLES
from winnow.reporting.figures import COLOURS, axes_grid, line_style, shared_legend, span
from winnow.studies.bypass.ranks import DEFINITIONS, METRICS

if TYPE_CHECKING:
    import pandas as pd

LOSS = "loss above dense (nats per token)\nbars: 2 standard errors"
ROW_NAMES = {
    "attention": "attention only",
    "ffn": "FFN only",
    "both": "both",
    "bypass": "both + bypass",
    "larger": "larger k + bypass",
}


def rows(table: pd.DataFrame) -> Figure:
    """Loss of every row of the paper's table and of its further cells; the paper's numbers as crosses."""
    models = list(table["model"].unique())
    figure, axes = axes_grid(len(models), 6.8, 4.2)
    for axis, model in zip(axes, models, strict=True):
        own = table[table["model"] == model].iloc[::-1].reset_index(drop=True)
        published = own["paper_delta_nll"].notna()
        for mask, style, label in ((published, line_style(0), "as published"), (~published, line_style(1), "beside it")):
            part = own[mask]
            axis.errorbar(
                part["delta_nll"], part.index, xerr=2 * part["delta_nll_se"], label=label, markersize=5, capsize=2,
                **{**style, "linestyle": "none"},
            )  # fmt: skip
        axis.plot(own["paper_delta_nll"], own.index, "x", color="black", label="the paper, on Llama-3.1-8B", markersize=6)
        names = [f"{ROW_NAMES[row['row']]}: {row['form']} ({row['keep_bytes']:.2f})" for _, row in own.iterrows()]
        axis.set_yticks(own.index, names, fontsize=7)
        axis.grid(axis="x", linewidth=0.4, color="0.85")
        axis.set_xlim(left=0)
        axis.set_title(f"{model}: the five rows (in brackets: share of the bytes kept)", fontsize=9)
        axis.set_xlabel(LOSS, fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def equal_bytes(table: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Loss of every form at equal bytes, the lowest at the top; a panel per model and budget."""
    panels = list(table.groupby(["model", "budget"], sort=False))
    figure, axes = axes_grid(len(panels), 4.8, 2.6)
    for axis, ((model, budget), part) in zip(axes, panels, strict=True):
        own = part.sort_values("delta_nll", ascending=False, kind="stable").reset_index(drop=True)
        for place, row in own.iterrows():
            bypass, random = "bypass" in row["method"], "random" in row["method"]
            style = {**line_style(1 if bypass else 0), "linestyle": "none", "fillstyle": "none" if random else "full"}
            axis.errorbar(row["delta_nll"], place, xerr=2 * row["delta_nll_se"], markersize=5, capsize=2, **style)
        axis.set_yticks(own.index, [names[method] for method in own["method"]], fontsize=7)
        axis.grid(axis="x", linewidth=0.4, color="0.85")
        what = "q, k, v and FFN" if str(budget).startswith("both") else "FFN"
        axis.set_title(f"{model}: {what}, {span(own['keep_bytes'])} of the bytes", fontsize=9)
        axis.set_xlabel(LOSS, fontsize=8)
    return figure


def ranks(table: pd.DataFrame) -> Figure:
    """Effective rank of every matrix over layers: a panel per model, definition and metric."""
    models, roles = list(table["model"].unique()), [role for role in ROLES if (table["role"] == role).any()]
    panels = [(model, definition, metric) for model in models for definition in DEFINITIONS for metric in METRICS]
    figure, axes = axes_grid(len(panels), 4.2, 2.3)
    for axis, (model, definition, metric) in zip(axes, panels, strict=True):
        part = table[(table["model"] == model) & (table["metric"] == metric)]
        for role in roles:
            own = part[part["role"] == role].sort_values("layer")
            axis.plot(own["layer"], own[definition], label=role, linewidth=1.2, markersize=4, **line_style(roles.index(role)))
        axis.set_ylim(0, 1.05 * float(table.loc[table["model"] == model, definition].max()))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{model}: {DEFINITIONS[definition]}\nof the {METRICS[metric]}", fontsize=8)
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylabel("rank (share of the\nsmaller side)", fontsize=8)
    shared_legend(figure, axes)
    return figure


def accounting(table: pd.DataFrame, model: str) -> Figure:
    """Removable parameters at the paper's ranks under every convention, and the paper's number."""
    figure, axes = axes_grid(1, 7.2, 2.8)
    own, axis = table[table["model"] == model], axes[0]
    names = list(dict.fromkeys(own["row"]))[::-1]
    for place, name in enumerate(names):
        part = own[own["row"] == name]
        counted = part[part["counted"]]
        low, high = (getattr(counted[["of_all", "of_blocks"]], of)().agg(of) for of in ("min", "max"))
        label = {"label": "possible, all stored numbers counted"} if place == 0 else {}
        axis.plot([low, high], [place, place], color=COLOURS[0], linewidth=7, solid_capstyle="butt", alpha=0.35, **label)
        style = {"markersize": 4, "linestyle": "none"}
        for key, fill in (("of_all", "full"), ("of_blocks", "none")):
            label = {"label": f"a convention, % of all {'parameters' if key == 'of_all' else 'blocks'}"} if place == 0 else {}
            axis.plot(counted[key], [place] * len(counted), color=COLOURS[0], marker="o", fillstyle=fill, **style, **label)
        free = part[~part["counted"]]
        label = {"label": "k / d, bases not counted"} if place == 0 else {}
        axis.plot(free["of_all"], [place] * len(free), color=COLOURS[1], marker="s", fillstyle="none", **style, **label)
        label = {"label": "claimed"} if place == 0 else {}
        axis.plot(
            part["claimed"].iloc[0], place, color="black", marker="x", markersize=9, markeredgewidth=2, linestyle="none", **label
        )
    axis.set_yticks(range(len(names)), [ROW_NAMES[name] for name in names])
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_title(f"{model}: parameters removed, from its config alone", fontsize=9)
    axis.set_xlabel("removed (%)")
    shared_legend(figure, axes)
    return figure
