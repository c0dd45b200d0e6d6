"""The frontier of a results folder as characters."""

from __future__ import annotations

import math
import re

FLOOR = 1e-5  # nats per token; what is below is drawn there
HEIGHT, AROUND = 22, 6  # lines, and those of them that are not distances between the curves
MARGIN = 0.35  # of the width of the curves, for their names
COLOURS = ("red", "orange", "magenta", "blue", "cyan", "green", "gray", "white")


def frontier(rows: list[dict[str, str]], width: int) -> list[str]:
    """Lines of a plot of the KL divergence from the dense model (or the loss above it, where there is none) against the share of
    the bytes, a curve per method. `rows`: of a summary, without the dense models. Empty if they are of several models,
    calibrations, recoveries, evaluations or targets, or at one share of the bytes."""
    import plotext as plt

    one = ("model", "calibration", "recovery", "evaluation", "targets")
    what = "kl" if all(row["kl"] for row in rows) else "delta_nll"
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["method"], []).append((float(row["keep_bytes"]), max(float(row[what]), FLOOR)))
    shares = sorted({round(x, 2) for points in curves.values() for x, _ in points})
    if len({tuple(row[name] for name in one) for row in rows}) != 1 or len(shares) < 2:
        return []
    plt.clear_figure()
    plt.plotsize(width, HEIGHT)
    plt.theme("clear")
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(curves)}
    for name, points in curves.items():
        ordered = sorted(points)
        plt.plot([x for x, _ in ordered], [y for _, y in ordered], color=colours[name], marker="braille")
    for name, y in _apart({name: min(points)[1] for name, points in curves.items()}, curves):
        plt.text(f"{name} ", x=shares[0], y=y, color=colours[name], alignment="right")
    plt.xlim(shares[0] - MARGIN * (shares[-1] - shares[0]), shares[-1])
    plt.xticks(shares)
    plt.yscale("log")
    plt.xlabel("share of the bytes that is kept")
    plt.title(f"{'KL divergence from' if what == 'kl' else 'Loss above'} the dense model, nats per token")
    return [re.sub(r"\s+((\x1b\[[0-9;]*m)*)$", r"\1", line) for line in plt.build().splitlines()]


def _apart(ends: dict[str, float], curves: dict[str, list[tuple[float, float]]]) -> list[tuple[str, float]]:
    """The heights of the names at the ends of the curves, at least a line apart."""
    logs = [math.log10(y) for points in curves.values() for _, y in points]
    line = (max(logs) - min(logs)) / (HEIGHT - AROUND)
    found: list[tuple[str, float]] = []
    for name, y in sorted(ends.items(), key=lambda end: -end[1]):
        highest = math.log10(found[-1][1]) - 1.01 * line if found else math.inf
        found.append((name, 10 ** min(math.log10(y), highest)))
    return found
