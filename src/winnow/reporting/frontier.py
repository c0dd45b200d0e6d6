"""The figures of losses: loss and KL against bytes, and methods ranked by loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from winnow.evaluation.spread import tied
from winnow.reporting.figures import COLOURS, LEGIBLE, axes_grid, line_style, span
from winnow.reporting.scales import plain, set_scale

BITS = (8, 4, 2)  # sizes of a number that are marked, besides that of the dense model
GREY = "0.72"
REFERENCES = 4  # models that are only rounded, at most
NEAR = 0.85  # of the horizontal axis, from which on the label of a line is beside the axis
TICKS = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01)
QUANTITIES = {"delta_nll": "loss above dense (nats per token)", "kl": "KL divergence from dense (nats per token)"}


def frontier(summary: pd.DataFrame, dense_bits: Mapping[str, float], quantities: Sequence[str] = tuple(QUANTITIES)) -> Figure:
    """Loss above the dense model, and the KL divergence from it if that was measured, against the share of bytes kept.

    A row of panels for every model, evaluation and targets, and a column for each of `quantities`; a line per method (and per
    calibration and recovery, if there are several). The lines with the lowest losses have a colour and a label at their end, the
    others are grey. `dense_bits`: {model: bits of a number of the dense matrices}, for the marks of sizes."""
    cells = with_lines(summary)
    panels = [(key, panel, coloured(panel)) for key, panel in cells.groupby(["model", "evaluation", "targets"], sort=False)]
    drawn = ((panel[panel["line"] == line], line) for _, panel, best in panels for line in best)
    lines = list(dict.fromkeys(line for own, line in drawn if not _reference(own)))
    columns = [name for name in quantities if name != "kl" or cells["kl"].notna().any()]
    if not columns:
        return plt.figure(figsize=(1, 1))
    size = (5.1 * len(columns), 3.9 * max(1, len(panels)))  # inches, of panels that stay readable at the width of a page
    figure, grid = plt.subplots(max(1, len(panels)), len(columns), figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr, call-arg]  # beside the labels of lines
    for row, ((model, evaluation, targets), panel, best) in zip(grid, panels, strict=True):
        for axis, quantity in zip(row, columns, strict=True):
            _draw(axis, panel, quantity, best, lines, dense_bits.get(str(model)))
        total, shown = panel["line"].nunique(), len(best)
        titles = [f"{model}, {str(targets).replace('+', ' + ')}, evaluation {evaluation}"]
        titles += [f"{shown} of {total} methods in colour: lowest mean rank over budgets"] if shown < total else []
        for axis, title in zip([row[0], row[-1]], titles, strict=False):
            text = "\n".join(titles) if len(columns) == 1 else title
            axis.set_title(text, fontsize=9.5 if title is titles[0] else 8, loc="left", pad=30)
    if len(columns) > 1 and len(cells):
        _explain(figure)
    return figure


def _draw(axis: Axes, panel: pd.DataFrame, quantity: str, best: list[str], lines: list[str], bits: float | None) -> None:
    """One panel; `best`: the lines in colour, `lines`: those of all panels, whose places give the colours."""
    rows = panel[panel[quantity].notna()]
    errors = rows["delta_nll_se"] if quantity == "delta_nll" else pd.Series(0.0, index=rows.index)
    _shares(axis, rows["keep_bytes"], bits)
    at = set_scale(axis, "y", rows[quantity].tolist(), errors.tolist())
    if at is not None:
        low, high = axis.get_ylim()
        axis.axhspan(max(low, -at), at, color="0.955", zorder=0)
        place = _place(axis, 1.0, at)[1]
        axis.text(0.02, place, f"linear below {plain(at)}", transform=axis.transAxes, fontsize=6.5, color="0.45", va="top")
        axis.set_ylim(low, high)
    axis.axhline(0, color="0.55", linewidth=0.8, zorder=1)
    ends = []
    for line, own in rows.groupby("line", sort=False):
        own = own.sort_values("keep_bytes", ascending=False)
        shares, values = own["keep_bytes"].to_numpy(), own[quantity].to_numpy()
        if line not in best:
            axis.plot(shares, values, color=GREY, linewidth=0.8, marker=".", markersize=3, zorder=1.5)
            continue
        style = line_style(lines.index(str(line))) if not _reference(own) else {"color": "0.15", "marker": "D", "linestyle": ""}
        bars = 2 * errors[own.index].to_numpy()
        axis.errorbar(shares, values, yerr=bars if quantity == "delta_nll" else None, linewidth=1.6, capsize=2, elinewidth=0.9,
                      markersize=0, **{**style, "marker": ""}, zorder=2)  # fmt: skip
        for share, value, bar in zip(shares, values, bars, strict=True):
            unclear = quantity == "delta_nll" and tied(value, bar / 2)
            axis.plot([share], [value], marker=style["marker"], markersize=5.5, color=style["color"], linestyle="", zorder=3,
                      markerfacecolor="white" if unclear else style["color"], markeredgewidth=1.2)  # fmt: skip
        ends.append((str(line), shares[-1], values[-1], style["color"]))
    axis.plot([1.0], [0.0], marker="*", markersize=11, color="black", linestyle="", zorder=4, clip_on=False)
    _label_ends(axis, ends)
    axis.set_ylabel(QUANTITIES[quantity])
    axis.grid(axis="y", color="0.92", linewidth=0.6, zorder=0)
    axis.set_axisbelow(True)


def _shares(axis: Axes, shares: pd.Series, bits: float | None) -> None:
    """The horizontal axis: shares of bytes from dense on the left to the smallest, and marks of sizes of numbers on top."""
    low = min(0.9, float(shares.min()))
    if low < 0.5:
        axis.set_xscale("log")
        axis.set_xlim(1.08, low / 1.09)
    else:
        axis.set_xlim(1.02, low - 0.04 * (1 - low))
    kept = sorted({1.0, *(float(f"{share:.2g}") for share in shares)})
    if len(kept) > 8 or any(above < 1.12 * below for below, above in pairwise(kept)):
        kept = [tick for tick in TICKS if tick >= low * 0.97]
    axis.xaxis.set_major_locator(FixedLocator(kept))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
    axis.set_xlabel("bytes kept of the compressed matrices (%)")
    named = {1.0: "dense" if bits is None else f"dense\n{bits:.3g} bits"}
    named |= {count / bits: f"{count} bits" for count in BITS if bits and low * 0.97 <= count / bits < 1}
    for place in list(named)[1:]:
        axis.axvline(place, color="0.6", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0.5)
    for place, text in named.items():
        axis.text(place, 1.015, text, transform=axis.get_xaxis_transform(), fontsize=7.5, color="0.3", ha="center", va="bottom")


def _place(axis: Axes, share: float, value: float) -> tuple[float, float]:
    """Where a point is, as shares of the lengths of both axes."""
    across, up = axis.transAxes.inverted().transform(axis.transData.transform((share, value)))
    return float(across), float(up)


def _label_ends(axis: Axes, ends: list[tuple[str, float, float, str]]) -> None:
    """The name of every line beside its last point, moved apart where they would overlap."""
    gap = 0.058  # of the axis, between two lines of text
    for name, share, value, colour in ends:
        if _place(axis, share, value)[0] < NEAR:  # a line that ends before the others: above its end
            axis.annotate(name, (share, value), (0, 7), textcoords="offset points", color=colour, fontsize=8, ha="center")
    ends = sorted((end for end in ends if _place(axis, end[1], end[2])[0] >= NEAR), key=lambda end: end[2])
    if not ends:
        return
    places = [_place(axis, share, value)[1] for _, share, value, _ in ends]
    wanted = list(places)
    for step in range(1, len(places)):
        places[step] = max(places[step], places[step - 1] + gap)
    places[-1] = min(places[-1], 1.0)
    for step in range(len(places) - 2, -1, -1):
        places[step] = min(places[step], places[step + 1] - gap)
    middle = float(np.mean(np.subtract(wanted, places)))
    shift = min(max(middle, -min(places)), 1.0 - max(places))
    for (name, share, value, colour), place in zip(ends, places, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
        given: dict[str, Any] = {"color": colour, "fontsize": 8.5, "va": "center", "arrowprops": arrow, "annotation_clip": False}
        axis.annotate(name, (share, value), (1.035, place + shift), textcoords="axes fraction", **given)


def _explain(figure: Figure) -> None:
    """What the marks mean, below all panels."""
    texts = {
        "dense model": "*",
        "measured; bars: 2 standard errors, paired by window": "o",
        "within 2 standard errors of dense": "o",
    }
    marks = [
        Line2D([], [], marker=marker, markersize=size, color="0.3", markerfacecolor=face, linestyle="", label=text)
        for (text, marker), size, face in zip(texts.items(), (9, 5, 5), ("black", "0.3", "white"), strict=True)
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=3, frameon=False, fontsize=7.5, handletextpad=0.3)


def ranking(summary: pd.DataFrame) -> Figure:
    """Loss above the dense model of every method, the lowest on top; a panel per model, evaluation, targets and budget.
    Open markers are methods that select at random."""
    cells = with_lines(summary)
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
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.grid(axis="x", linewidth=0.4, color="0.85")
        at = set_scale(axis, "x", rows["delta_nll"].tolist(), rows["delta_nll_se"].tolist())
        below = "" if at is None else f"; linear below {plain(at)}"
        axis.set_title(f"{model}: {budget}, {span(rows['keep_bytes'])} of the bytes", fontsize=9)
        axis.set_xlabel(f"loss above dense (nats per token), evaluation {evaluation}{below}", fontsize=8)
    return figure


def with_lines(summary: pd.DataFrame) -> pd.DataFrame:
    """Compressed cells with a column `line`: the method, and calibration or recovery if there are several."""
    cells = summary[summary["method"] != "dense"]
    several = [name for name in ("calibration", "recovery") if cells[name].nunique() > 1]
    return cells.assign(line=cells[["method", *several]].agg(", ".join, axis=1))


def coloured(panel: pd.DataFrame) -> list[str]:
    """The lines of a panel that have a colour and a label, in the order of the table: all if they are few; else those with the
    lowest mean rank over their budgets, among the lines with the most budgets. Models that are only rounded are beside them."""
    fixed = [str(line) for line, own in panel.groupby("line", sort=False) if _reference(own)]
    lines = [str(line) for line in panel["line"].unique()]
    best = set(lines)
    if len(lines) - len(fixed) > LEGIBLE:
        places = panel.assign(place=panel.groupby("budget")["delta_nll"].rank()).groupby("line", sort=False)["place"]
        full = places.mean()[places.count() == places.count().max()]
        full = full[~full.index.isin(fixed)]
        best = {*fixed[:REFERENCES], *full.nsmallest(LEGIBLE).index.astype(str)}
    return [line for line in lines if line in best]


def _reference(rows: pd.DataFrame) -> bool:
    """Whether the rows of a line are a model that is only rounded, at its one size."""
    return len(rows) == 1 and rows["structure"].iloc[0] == "rounded"
