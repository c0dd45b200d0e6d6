"""Axes of losses that span decades: logarithmic, and linear around 0 below the resolution of the measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

SPAN = 20.0  # ratio of the largest loss to the smallest, or to the error of those around 0, from which on a scale is logarithmic
DECADES = 6  # at most
EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def threshold(values: Sequence[float], errors: Sequence[float]) -> float | None:
    """Where a symmetric logarithmic scale becomes linear, a power of ten; None if a linear scale shows all values.

    Values within two standard errors of 0 have no logarithm to trust: the threshold is about their error (the median of two
    standard errors), so that they are drawn in the linear part. Without such values it is below the smallest one."""
    sizes, noise = np.abs(np.asarray(values, dtype=np.float64)), 2 * np.nan_to_num(np.asarray(errors, dtype=np.float64))
    clear, unclear = sizes[(sizes > noise) & (sizes > 0)], noise[(sizes <= noise) & (noise > 0)]
    if not len(clear) or clear.max() < SPAN * min([clear.min(), *unclear]):
        return None
    lowest = 10.0 ** (math.ceil(math.log10(clear.max())) - DECADES)
    resolved = 10.0 ** math.ceil(math.log10(np.median(unclear))) if len(unclear) else 10.0 ** math.floor(math.log10(clear.min()))
    return float(np.clip(resolved, lowest, 10.0 ** math.floor(math.log10(clear.max() / 2))))


def set_scale(axis: Axes, which: str, values: Sequence[float], errors: Sequence[float]) -> float | None:
    """Set the scale of the axis `which` (`x` or `y`) for these values, and limits that contain two standard errors of each.
    Returns the threshold of a logarithmic scale."""
    middle, bars = np.asarray(values, dtype=np.float64), 2 * np.nan_to_num(np.asarray(errors, dtype=np.float64))
    low, high = float((middle - bars).min(initial=0)), float((middle + bars).max(initial=0))
    at = threshold(values, errors)
    if at is None:
        margin = 0.06 * (high - low or 1.0)
        _of(axis, which, "lim")(low - margin, high + margin)
        return None
    _of(axis, which, "scale")("symlog", linthresh=at, linscale=0.7)
    _of(axis, which, "lim")(min(-0.35 * at, 1.3 * low), 1.7 * high)
    ruler = getattr(axis, f"{which}axis")
    ruler.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    ruler.set_minor_formatter(NullFormatter())
    return at


def _of(axis: Axes, which: str, what: str):
    return getattr(axis, f"set_{which}{what}")


def plain(value: float) -> str:
    """A tick label: digits where they are few, else a power of ten."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.12g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = value / 10.0**exponent
    sign = {1.0: "", -1.0: "-"}.get(round(factor, 6), f"{factor:.3g}·")
    return f"{sign}10{str(exponent).translate(EXPONENTS)}"
