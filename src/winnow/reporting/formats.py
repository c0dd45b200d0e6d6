"""Numbers as text, for pages."""

from __future__ import annotations

import math


def perplexity(value: float) -> str:
    """Two decimals up to 1,000, whole numbers up to 100,000, and above only two digits and the power of ten."""
    if value < 1e3:
        return f"{value:.2f}"
    if value < 1e5:
        return f"{value:,.0f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e") if math.isfinite(value) else "infinite"


def with_error(value: float, error: float) -> str:
    """`value ± error` with four decimals, or up to seven such that one digit of the error is shown; a dash without a value and no
    error if it is unknown."""
    if value != value:
        return "\u2013"
    if error != error:
        return f"{value:.4f}"
    decimals = next((n for n in range(4, 7) if error >= 0.5 * 10**-n), 7 if error else 4)
    return f"{round(value, decimals) + 0.0:.{decimals}f} ± {error:.{decimals}f}"  # + 0.0: no -0.0000


def loss(value: float) -> str:
    """Nats with four decimals, or two digits and the power of ten below 0.001; a dash if unknown."""
    if value != value:
        return "\u2013"
    return f"{value:.1e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    """`0.7 s`, `42 s`, `3 min 05 s`, `2 h 10 min`; a dash if unknown."""
    if seconds is None:
        return "\u2013"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float | None) -> str:
    """Bytes in units of 1,000 with three digits; a dash if unknown."""
    if count is None or count != count:
        return "\u2013"
    power = min(4, max(0, int(math.log10(max(1, count)) // 3)))
    value = count / 1000.0**power
    digits = 0 if not power or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
