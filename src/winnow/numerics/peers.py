"""How peers of GPTQ choose the grids of a matrix: zero points by half-quadratic splitting (HQQ) and channel scales (AWQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.numerics.grids import Form, scaled
from winnow.numerics.linalg import weighted_error
from winnow.numerics.rounding import grouped, in_float16, multiplied

# Of HQQ's own code: the norm of the errors, the weight of the quadratic term and its growth, and the number of steps; the
# smallest spread of a group that is rounded, and the smallest scale.
NORM, WEIGHT, GROWTH, STEPS = 0.7, 10.0, 1.01, 20
SPREAD, SMALLEST = 1e-4, 5e-5
EXPONENTS = [step / 20 for step in range(21)]  # of the mean absolute inputs, tried for channel scales
RANGE = 1e4  # the largest ratio of two mean absolute inputs; channels without input would otherwise be scaled to 0


def half_quadratic(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """(scales, zero points), both (m, groups) float16, of a matrix (m, n) with codes 0 .. 2^bits - 1: scales span every group
    from its smallest to its largest number, and zero points are real numbers that make the sum of |error|^0.7 small (Badri and
    Shaji 2023). Every group has the best zero point of all steps, of which the first is where its smallest number has code 0.

    Raises ValueError for a scale or zero point above the largest float16.
    """
    parts, real = grouped(weight.double(), form.group), grouped(torch.ones_like(weight, dtype=torch.float64), form.group)
    inside = real > 0  # the last group may be smaller
    low, high = parts.where(inside, torch.inf).amin(2), parts.where(inside, -torch.inf).amax(2)
    steps = ((high - low) / form.codes[1]).clamp(min=SMALLEST)
    scales = in_float16(torch.where(high - low > SPREAD, steps, 1))
    wide = scales.double()[..., None]
    zeros = -low / wide[..., 0]
    best, least, weighting = zeros, torch.full_like(zeros, torch.inf), WEIGHT
    for _ in range(STEPS + 1):
        point = zeros.half().double()[..., None]
        codes = (parts / wide + point).round().clamp(*form.codes)
        rest = (parts - (codes - point) * wide) * real
        error = rest.abs().pow(NORM).sum(2)
        better = error < least
        best, least = zeros.where(better, best), error.where(better, least)
        sparse = rest.sign() * (rest.abs() - rest.abs().pow(NORM - 1) / weighting).clamp(min=0)
        zeros = ((codes - (parts - sparse) / wide) * real).sum(2) / real.sum(2)
        weighting *= GROWTH
    if not torch.isfinite(best.half()).all():
        raise ValueError(
            f"a zero point of {float(best.abs().max()):.3g} is too large for float16, in which zero points are stored"
        )
    return scales, best.half()


def nearest(weight: Tensor, form: Form, scales: Tensor, zeros: Tensor) -> Tensor:
    """(m, n) float64: the nearest codes of a matrix, for scales and zero points (m, groups)."""
    steps, points = scales.double(), zeros.double()
    codes = grouped(weight.double(), form.group) / steps.where(steps != 0, 1)[..., None] + points[..., None]
    codes = codes.round().where(steps[..., None] != 0, points[..., None])
    return codes.clamp(*form.codes).flatten(1)[:, : weight.shape[1]]


def scaled_channels(weight: Tensor, form: Form, sizes: Tensor, columns: Tensor, rows: Tensor | None) -> Tensor:
    """(n,) float16: factors of the inputs of a matrix W (m, n) with which its rounding loses least in the metric C, R, as in AWQ.

    Inputs are multiplied by them, and W, before it is rounded to nearest, divided. They are `sizes`^-a, for that exponent a in
    `EXPONENTS` with the lowest error; `sizes` (n,): mean absolute inputs. With a = 0 nothing is scaled.
    """
    largest = sizes.max()
    sizes = (sizes / largest).clamp(min=1 / RANGE) if largest > 0 else torch.ones_like(sizes)
    best, least = torch.ones_like(sizes).half(), torch.inf
    for exponent in EXPONENTS:
        wide = sizes.pow(exponent)
        factors = ((wide.max() * wide.min()).sqrt() / wide).half()
        kept = channel_matrix(weight, form, factors)
        if (error := float(weighted_error(weight - kept, columns, rows))) < least:
            best, least = factors, error
    return best


def channel_matrix(weight: Tensor, form: Form, factors: Tensor) -> Tensor:
    """(m, n) float64: W as it is after rounding W / factors and multiplying by them again."""
    scales, zeros = scaled(weight / factors.double(), form, "largest", torch.ones_like(weight[0]))
    codes = nearest(weight / factors.double(), form, scales, zeros)
    return multiplied(codes, scales.double(), form.group, zeros) * factors.double()
