"""Figures: loss against bytes, methods ranked by loss, and effective rank against depth. Legible in print and in greyscale."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from winnow.io.artifacts import atomic, write_markup
from winnow.io.records import Provenance
from winnow.models.architectures import ROLES

# Okabe and Ito's palette, safe for colour-blind readers; markers repeat the information of colours.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LEGIBLE = 12  # largest number of lines in one panel
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
plt.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "winnow", "svg.fonttype": "none"}
)


def line_style(index: int) -> dict:
    """Colour, marker and dashes of line `index`."""
    dashes = ["-", "--", ":", "-."][index // len(COLOURS) % 4]
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": dashes}


def axes_grid(count: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list]:
    """A figure of `count` panels, two in a row; width and height of a panel in inches."""
    columns = min(count, 2) or 1
    rows = math.ceil(count / columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def frontier(summary: pd.DataFrame) -> Figure:
    """Increase of the loss over the dense model against kept bytes; a panel per model, evaluation and targets, a line per
    method (and per calibration and recovery, if there are several). If there are many methods, only the best of each panel."""
    cells = _with_lines(summary)
    panels = [(key, _best(panel)) for key, panel in cells.groupby(["model", "evaluation", "targets"], sort=False)]
    lines = list(dict.fromkeys(line for _, (panel, _) in panels for line in panel["line"]))
    figure, axes = axes_grid(len(panels))
    for axis, ((model, evaluation, targets), (panel, total)) in zip(axes, panels, strict=True):
        for line, rows in panel.groupby("line", sort=False):
            rows = rows.sort_values("keep_bytes")
            axis.errorbar(
                rows["keep_bytes"], rows["delta_nll"], yerr=2 * rows["delta_nll_se"], label=line,
                linewidth=1.2, markersize=4.5, capsize=2, **line_style(lines.index(str(line))),
            )  # fmt: skip
        axis.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        shown = panel["line"].nunique()
        of = "" if shown == total else f" ({shown} lowest of {total} methods)"
        axis.set_title(f"{model}: {str(targets).replace('+', ' + ')}{of}", fontsize=9)
        axis.set_xlabel("bytes kept of the compressed matrices (share)")
        axis.set_ylabel(f"loss above dense (nats per token)\n{_dense(summary, str(model), str(evaluation))}", fontsize=8)
        axis.invert_xaxis()
    shared_legend(figure, axes, "bars: 2 standard errors")
    return figure


def ranking(summary: pd.DataFrame) -> Figure:
    """Loss above the dense model of every method, the lowest on top; a panel per model, evaluation, targets and budget.
    Open markers are methods that select at random."""
    cells = _with_lines(summary)
    panels = list(cells.groupby(["model", "evaluation", "targets", "budget"], sort=False))
    figure, axes = axes_grid(len(panels), 4.6, max([1.2, *(0.8 + 0.16 * len(panel) for _, panel in panels)]))
    for axis, ((model, evaluation, _, budget), panel) in zip(axes, panels, strict=True):
        rows = panel.sort_values("delta_nll", ascending=False, kind="stable").reset_index(drop=True)
        for place, row in rows.iterrows():
            style = {"fillstyle": "none"} if "random" in row["method"] else {}
            axis.errorbar(
                row["delta_nll"], place, xerr=2 * row["delta_nll_se"], fmt="o", color=COLOURS[0], markersize=4, capsize=2, **style
            )
        axis.set_yticks(rows.index, rows["line"], fontsize=7)
        axis.grid(axis="x", linewidth=0.4, color="0.85")
        if (rows["delta_nll"] > 0).all() and rows["delta_nll"].max() > 20 * rows["delta_nll"].min():
            axis.set_xscale("log")
        axis.set_title(f"{model}: {budget}, {span(rows['keep_bytes'])} of the bytes", fontsize=9)
        axis.set_xlabel(f"loss above dense (nats per token); {_dense(summary, str(model), str(evaluation))}", fontsize=8)
    return figure


def span(shares: pd.Series) -> str:
    """The range of shares, or one number if they are nearly equal."""
    low, high = shares.min(), shares.max()
    return f"{high:.3f}" if high - low < 0.005 else f"{low:.3f} to {high:.3f}"


def _with_lines(summary: pd.DataFrame) -> pd.DataFrame:
    """Compressed cells with a column `line`: the method, and calibration or recovery if there are several."""
    cells = summary[summary["method"] != "dense"]
    several = [name for name in ("calibration", "recovery") if cells[name].nunique() > 1]
    return cells.assign(line=cells[["method", *several]].agg(", ".join, axis=1))


def _best(panel: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """(rows of the lines to show in one panel, number of all lines): those with the lowest mean rank over their budgets, among
    the lines with the most budgets."""
    places = panel.assign(place=panel.groupby("budget")["delta_nll"].rank()).groupby("line", sort=False)["place"]
    total = places.ngroups
    if total <= LEGIBLE:
        return panel, total
    full = places.mean()[places.count() == places.count().max()]
    return panel[panel["line"].isin(full.nsmallest(LEGIBLE).index)], total


def _dense(summary: pd.DataFrame, model: str, evaluation: str) -> str:
    same = (summary["method"] == "dense") & (summary["model"] == model) & (summary["evaluation"] == evaluation)
    return f"dense: {summary.loc[same, 'nll'].iloc[0]:.3f} nats, {evaluation}"


def shared_legend(figure: Figure, axes: list, title: str | None = None) -> None:
    """One legend for all panels, with every label once."""
    labels: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(
        labels.values(), labels.keys(), frameon=False, fontsize=8, loc="outside right center", title=title, title_fontsize=7
    )


def effective_rank(spectra: Mapping[tuple[str, ...], pd.DataFrame]) -> Figure:
    """Share of directions with 95 % of the energy, by layer and matrix; one panel per method.

    `spectra` maps (model label, calibration label, method label) to the rows of spectra.parquet.
    """
    figure, axes = axes_grid(len(spectra))
    seen = {role for frame in spectra.values() for role in frame["role"]}
    roles = sorted(seen, key=lambda role: (ROLES.index(role) if role in ROLES else len(ROLES), role))
    for axis, ((model, _, method), frame) in zip(axes, spectra.items(), strict=True):
        for role in (r for r in roles if (frame["role"] == r).any()):
            rows = frame[frame["role"] == role].sort_values("layer")
            share = rows["k95"] / rows["singular_values"].map(len)
            axis.plot(rows["layer"], share, label=role, linewidth=1.2, markersize=4, **line_style(roles.index(role)))
        axis.set_ylim(0, 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{model.rpartition('-')[0]}, {method.rpartition('-')[0]} (metric: {frame['metric'].iloc[0]})", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylabel("k95 (share of the smaller side)")
    shared_legend(figure, axes)
    return figure


def save(figure: Figure, paths: Iterable[str], provenance: Provenance) -> None:
    """Write the figure to every path, in the format of the path's ending. The same figure results in the same bytes."""
    for path in paths:
        if path.endswith(".svg"):
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            write_markup(path, text.getvalue(), provenance)
        else:
            with atomic(path) as partial:
                figure.savefig(partial, format=path.rpartition(".")[2], dpi=160)
    plt.close(figure)
