"""Figures of the study of FFSplit, from its tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from winnow.reporting.figures import axes_grid, line_style, shared_legend, span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = "bars: 2 standard errors"
NAMES = {
    "dense": "dense",
    "split": "split (FFSplit)",
    "split_random": "split, random neurons",
    "split_whitened": "split, whitened light part",
    "split_affine": "split, affine light part",
    "svd": "SVD of all neurons",
    "whitened": "whitened SVD of all neurons",
    "neuron_slice": "neuron slice (MoDeGPT)",
}

ZEROED = {
    "top by act": "largest hidden units",
    "top by act_x_row": "largest contributions to the output",
    "top by weight_norm": "largest weights",
    "bottom by act": "smallest hidden units",
    "bottom by act_x_row": "smallest contributions to the output",
}


def drawn(frames: dict[str, pd.DataFrame], names: Iterable[str]) -> dict[str, Figure]:
    """{name: figure}; a figure without data says so."""
    makers = {"concentration": _concentration, "zeroed": _zeroed, "sweeps": _sweeps, "loss": _loss, "latency": _latency}
    makers["quantised"] = _quantised
    return {name: makers[name](frames[name]) if len(frames[name]) else _nothing() for name in names}


def _nothing() -> Figure:
    figure, (axis,) = axes_grid(1, 4.2, 1.2)
    axis.axis("off")
    axis.text(0, 0.5, "no model here has what this figure shows")
    return figure


def _panels(frame: pd.DataFrame, keys: list[str], width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Any]]:
    groups = list(frame.groupby(keys, sort=False))
    figure, axes = axes_grid(len(groups), width, height)
    return figure, [(axis, *group) for axis, group in zip(axes, groups, strict=True)]


def _concentration(frame: pd.DataFrame) -> Figure:
    shown = {
        ("act", "held"): "hidden units, summed over the calibration text",
        ("act", "held_elsewhere"): "the same neurons, other text",
        ("act_x_row", "held"): "what neurons add to the output, calibration text",
        ("act", "per_token"): "hidden units, mean over single tokens",
        ("act", "per_token_best"): "the heaviest quarter of every single token",
    }
    figure, panels = _panels(frame, ["model"], 6.8)  # the legend is as wide as a panel
    for axis, (model,), rows in panels:
        for i, ((criterion, key), label) in enumerate(shown.items()):
            own = rows[rows["criterion"] == criterion].sort_values("layer")
            axis.plot(own["layer"], own[key], label=label, markersize=4, linewidth=1.2, **line_style(i))
        axis.axhline(0.25, color="0.5", linewidth=0.8, linestyle=":", label="a quarter chosen at random")
        axis.set_ylim(0, 1)
        axis.set_title(f"{model}: heaviest quarter of the neurons", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylabel("part of the sum of squares that they hold")
        axis.xaxis.get_major_locator().set_params(integer=True)
    shared_legend(figure, [axis for axis, *_ in panels])
    return figure


def _dots(axis: Any, labels: list[str], values: pd.Series, errors: pd.Series, index: int = 0, **more: Any) -> None:
    style = {**line_style(index), "linestyle": "none"}
    axis.errorbar(values, range(len(labels)), xerr=2 * errors, markersize=4, capsize=2, **style, **more)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.grid(axis="x", linewidth=0.4, color="0.85")


def _zeroed(frame: pd.DataFrame) -> Figure:
    figure, panels = _panels(frame, ["model"], 6.0, 2.4)
    for axis, (model,), rows in panels:
        rows = rows.sort_values("delta_nll", ascending=False)
        _dots(axis, [ZEROED.get(name, name) for name in rows["zeroed"]], rows["delta_nll"], rows["delta_nll_se"])
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(f"{model}: 3 % of the neurons of every FFN zeroed", fontsize=9)
        axis.set_xlabel(f"loss above dense (nats per token); {BARS}", fontsize=8)
    return figure


def _sweeps(frame: pd.DataFrame) -> Figure:
    models = list(frame["model"].unique())
    figure, axes = axes_grid(2 * len(models))
    for i, model in enumerate(models):
        rows = frame[frame["model"] == model]
        left, right = axes[2 * i : 2 * i + 2]
        shares = rows[rows["sweep"].str.startswith("heavy")]
        for j, (name, own) in enumerate(shares.groupby("sweep", sort=False)):
            errors = 2 * own["delta_nll_se"]
            label = str(name).removeprefix("heavy share, ")
            left.errorbar(own["heavy"], own["delta_nll"], yerr=errors, label=label, markersize=4, capsize=2, **line_style(j))
        left.set_xlabel("share of the neurons kept as they are")
        ranks = rows[rows["sweep"] == "light rank"]
        for j, (metric, own) in enumerate(ranks.groupby("metric", sort=False)):
            label = {"weights": "plain SVD (FFSplit)", "gram": "whitened SVD"}[str(metric)]
            errors = 2 * own["delta_nll_se"]
            right.errorbar(
                own["keep_bytes"], own["delta_nll"], yerr=errors, label=label, markersize=4, capsize=2, **line_style(j)
            )
        for _, point in ranks[ranks["metric"] == "weights"].iterrows():
            place = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 7}
            right.annotate(f"{point['light_rank']:.0%}", (point["keep_bytes"], point["delta_nll"]), **place)
        right.set_xlabel("bytes kept of the FFNs (share)")
        for axis, what, title in ((left, "share of heavy neurons", "light part"), (right, "rank of the light part", "its SVD")):
            axis.set_title(f"{model}: {what}", fontsize=9)
            axis.set_ylabel(f"loss above dense (nats per token)\n{BARS}", fontsize=8)
            axis.legend(frameon=False, fontsize=7, title=title, title_fontsize=7)
    return figure


def _loss(frame: pd.DataFrame) -> Figure:
    figure, panels = _panels(frame, ["model"], 5.6, 2.9)
    for axis, (model,), rows in panels:
        plain = rows[(rows["recovery"] == "none") & (rows["method"] != "dense")].sort_values("delta_nll", ascending=False)
        labels = [*(NAMES[name] for name in plain["method"]), NAMES["dense"]]
        _dots(axis, labels[:-1], plain["delta_nll"], plain["delta_nll_se"], 0, label="compressed")
        tuned = rows[rows["recovery"] != "none"]
        places = [labels.index(NAMES[name]) for name in tuned["method"]]
        style = {**line_style(1), "linestyle": "none"}
        axis.errorbar(
            tuned["delta_nll"], places, xerr=2 * tuned["delta_nll_se"], label="and fine-tuned", markersize=4, capsize=2, **style
        )
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(f"{model}: FFNs at {span(plain['keep_bytes'])} of their bytes", fontsize=9)
        axis.set_xlabel(f"loss above dense (nats per token); {BARS}", fontsize=8)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _latency(frame: pd.DataFrame) -> Figure:
    figure, panels = _panels(frame, ["model"], 5.6, 2.6)
    for axis, (model,), rows in panels:
        rows = rows[rows["form"] == "split"].iloc[::-1]
        labels = [f"{row.phase}, batch {row.batch}" for row in rows.itertuples()]
        spread = [rows["ratio"] - rows["ratio_low"], rows["ratio_high"] - rows["ratio"]]
        places, style = range(len(labels)), {**line_style(0), "linestyle": "none"}
        axis.errorbar(rows["ratio"], places, xerr=spread, label="split, 95 % of the median", markersize=4, capsize=2, **style)
        axis.hlines(
            places, rows["control_q1"], rows["control_q3"], color="0.6", linewidth=4, label="dense against dense, quartiles"
        )
        axis.axvspan(1 / 1.56, 1 / 1.25, color="#56B4E9", alpha=0.25, linewidth=0, label="claimed (1.25 to 1.56 times as fast)")
        axis.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
        axis.set_yticks(places, labels, fontsize=7)
        axis.set_ylim(-0.6, len(labels) - 0.4)
        axis.set_title(f"{model}: a quarter of neurons heavy, a tenth of the rank; {rows['name'].iloc[0]}", fontsize=8)
        axis.set_xlabel("time over the dense model's")
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _quantised(frame: pd.DataFrame) -> Figure:
    figure, panels = _panels(frame, ["model", "scale"], 3.6, 3.2)
    sides = {"split": "split; heavy part / light part", "all": "all neurons alike"}
    for axis, (model, scale), rows in panels:
        for i, (side, label) in enumerate(sides.items()):
            numbers, loss = f"{side}_per_number", f"{side}_nll"
            own = rows.drop_duplicates(numbers).sort_values(numbers)
            errors = 2 * own[f"{loss}_se"]
            axis.errorbar(own[numbers], own[loss], yerr=errors, label=label, markersize=4, capsize=2, **line_style(i))
            for row in own.itertuples():
                bits = f"{row.heavy_bits}/{row.light_bits}" if side == "split" else f"{row.all_bits}"
                place = {"xytext": (0, 6), "textcoords": "offset points", "fontsize": 7, "ha": "center"}
                axis.annotate(bits, (getattr(row, numbers), getattr(row, loss)), **place)
        axis.margins(0.12)
        axis.set_title(f"{model}: a scale per {str(scale).removeprefix('of ').removeprefix('a ')}", fontsize=9)
        axis.set_xlabel("bits per number of the dense FFNs,\nscales counted", fontsize=8)
        axis.set_ylabel(f"loss above dense (nats per token)\n{BARS}", fontsize=8)
    shared_legend(figure, [axis for axis, *_ in panels], "numbers: bits")
    return figure
