"""What figures have in common, and effective rank against depth. Legible in print and in greyscale."""

from __future__ import annotations

import io
import math
import textwrap
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
LEGIBLE = 7  # largest number of lines with a colour in one panel
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


def span(shares: pd.Series) -> str:
    """The range of shares, or one number if they are nearly equal."""
    low, high = shares.min(), shares.max()
    return f"{high:.3f}" if high - low < 0.005 else f"{low:.3f} to {high:.3f}"


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
    """Share of directions with 95 % of the energy, by layer and matrix; one panel for all methods with the same spectra.

    `spectra` maps (model label, calibration label, method label) to the rows of spectra.parquet.
    """
    panels = list(_distinct(spectra).values())
    figure, axes = axes_grid(len(panels))
    seen = {role for frame in spectra.values() for role in frame["role"]}
    roles = sorted(seen, key=lambda role: (ROLES.index(role) if role in ROLES else len(ROLES), role))
    for axis, (names, frame) in zip(axes, panels, strict=True):
        for role in (r for r in roles if (frame["role"] == r).any()):
            rows = frame[frame["role"] == role].sort_values("layer")
            share = rows["k95"] / rows["singular_values"].map(len)
            axis.plot(rows["layer"], share, label=role, linewidth=1.2, markersize=4, **line_style(roles.index(role)))
        axis.set_ylim(0, 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
        (model, calibration, _), methods = names[0], dict.fromkeys(name[2].rpartition("-")[0] for name in names)
        text = f"{model.rpartition('-')[0]}, metric {frame['metric'].iloc[0]} on calibration {calibration.rpartition('-')[0]}"
        axis.set_title(f"{text}\n{wrapped(', '.join(methods))}", fontsize=8)
        axis.set_xlabel("layer")
        axis.set_ylabel("k95 (share of the smaller side)")
    shared_legend(figure, axes)
    return figure


def _distinct(spectra: Mapping[tuple[str, ...], pd.DataFrame]) -> dict[tuple, tuple[list[tuple[str, ...]], pd.DataFrame]]:
    """The spectra without repetitions, each with the names that have it: methods that differ in how bytes are distributed share
    their factors."""
    found: dict[tuple, tuple[list[tuple[str, ...]], pd.DataFrame]] = {}
    for name, frame in spectra.items():
        shown = zip(frame["group"], frame["metric"], frame["k95"], map(len, frame["singular_values"]), strict=True)
        found.setdefault((*name[:2], *shown), ([], frame))[0].append(name)
    return found


def wrapped(names: str, width: int = 60, lines: int = 2) -> str:
    """Names in at most `lines` lines."""
    return "\n".join(textwrap.wrap(names, width, max_lines=lines, placeholder=" ..."))


def svg_of(figure: Figure) -> str:
    """The figure as SVG. The same figure results in the same text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save(figure: Figure, paths: Iterable[str], provenance: Provenance) -> None:
    """Write the figure to every path, in the format of the path's ending. The same figure results in the same bytes."""
    for path in paths:
        if path.endswith(".svg"):
            write_markup(path, svg_of(figure), provenance)
        else:
            with atomic(path) as partial:
                figure.savefig(partial, format=path.rpartition(".")[2], dpi=160)
    plt.close(figure)
