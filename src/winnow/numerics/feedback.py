"""Rounding with error feedback: codes that make tr(F D C D^T), D = Q - W, small, instead of the nearest code of every number.

With F = I rows are independent, and the rule is GPTQ's (arXiv 2210.17323): columns are rounded one after the other, and the
error of each is compensated in the columns that follow. With C = R R^T, R upper triangular, that makes every column of D R as
small as the grid allows. With a full F errors are compensated in the rows as well (`winnow.numerics.wavefront`, LDL feedback on
both sides, as in YAQA, arXiv 2505.22988), and coordinate descent follows (`winnow.numerics.descent`).

Several grids of one matrix are rounded at once: the first axis of `scales` and `zeros` has S grids.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.numerics.descent import descend_codes, slopes_of
from winnow.numerics.grids import Form
from winnow.numerics.wavefront import both_feedback, pull_of, upper_root

log = logging.getLogger(__name__)
BLOCK, INNER = 128, 16  # columns before a product of matrices applies their errors to all others, and to the rest of the block
DAMPING = 0.01  # added to the diagonals of C and F, as a share of their means


@dataclass(frozen=True)
class Grids:
    """S grids of a matrix (m, n): (code - zero) * scale, codes in low .. high."""

    scales: Tensor  # (S, m, n) float64, signed; 0 where all numbers of a group are 0
    zeros: Tensor  # (S, m, n) float64
    low: Tensor  # (S,)
    high: Tensor  # (S,)

    def ordered(self, rows: Tensor, columns: Tensor) -> Grids:
        scales, zeros = (part[:, rows][:, :, columns] for part in (self.scales, self.zeros))
        return Grids(scales, zeros, self.low, self.high)

    def nearest(self, targets: Tensor) -> Tensor:
        """Codes (S, m, n) of the grid points nearest to `targets` (S, m, n) or (m, n)."""
        return _codes(targets, self.scales, self.zeros, self.low[:, None, None], self.high[:, None, None])

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zeros) * self.scales


def _codes(targets: Tensor, scales: Tensor, zeros: Tensor, low: Tensor, high: Tensor) -> Tensor:
    codes = (targets / torch.where(scales == 0, 1, scales) + zeros).round()
    return torch.where(scales == 0, zeros, codes).clamp(low, high)


@dataclass(frozen=True)
class Weighing:
    """A full metric: C (n, n) and F (m, m), or None for independent rows; both damped."""

    columns: Tensor
    rows: Tensor | None


def metric_for(columns: Tensor, rows: Tensor | None) -> Weighing | None:
    """The damped metric for error feedback from C and R (see `Problem`); None if both are diagonal and rounding to nearest is
    optimal."""
    full = rows if rows is not None and rows.dim() == 2 else None
    if columns.dim() == 1 and full is None:
        return None
    return Weighing(damped(columns if columns.dim() == 2 else columns.diag()), None if full is None else damped(full))


def grids_of(forms: Sequence[Form], made: Sequence[tuple[Tensor, Tensor]], columns: int) -> Grids:
    """The grids of the forms, with scales and zero points (m, groups) expanded to every number of a row."""
    parts = [
        torch.stack([
            part[which].double().repeat_interleave(form.group, 1)[:, :columns] for form, part in zip(forms, made, strict=True)
        ])
        for which in (0, 1)
    ]  # fmt: skip
    ends = torch.tensor([form.codes for form in forms], dtype=torch.float64, device=parts[0].device)
    return Grids(parts[0], parts[1], ends[:, 0], ends[:, 1])


def codes_of(
    weight: Tensor, forms: Sequence[Form], made: Sequence[tuple[Tensor, Tensor]], metric: Weighing | None, sweeps: int, name: str
) -> Tensor:
    """(forms, m, n): codes of a matrix for every form with its scales and zero points; nearest codes if there is no metric.

    Columns and rows are rounded by descending diagonal of the metric, as with GPTQ's `act_order` and `static_groups`; with
    both sides, `sweeps` of coordinate descent follow. The error in the metric is logged after every step.
    """
    grids = grids_of(forms, made, weight.shape[1])
    if metric is None:
        return grids.nearest(weight)
    down = metric.columns.diagonal().argsort(descending=True, stable=True)
    if metric.rows is None:
        across, rows = torch.arange(len(weight), device=weight.device), None
    else:
        across = metric.rows.diagonal().argsort(descending=True, stable=True)
        rows = metric.rows[across][:, across]
    weight, grids, columns = weight[across][:, down], grids.ordered(across, down), metric.columns[down][:, down]
    change = grids.values(grids.nearest(weight)) - weight
    errors = [objective(change, rows, columns)]
    if rows is None:
        change, error = gram_feedback(weight, grids, columns)
        errors.append(error)
    else:
        fed = both_feedback(weight, grids, rows, columns)
        slopes = slopes_of(fed, rows, columns)
        errors.append((slopes * fed).sum((1, 2)))
        worse = errors[1] >= errors[0]
        if worse.any():
            fed[worse] = change[worse]
            slopes[worse] = slopes_of(change[worse], rows, columns)
        change, lowered = descend_codes(weight, grids, rows, columns, fed, slopes, sweeps)
        errors.append(torch.minimum(*errors) - lowered)
    codes = grids.nearest(weight + change)
    for form, *found in zip(forms, *(error.tolist() for error in errors), strict=True):
        steps = ", ".join(f"{step} {error:.3g}" for step, error in zip(("nearest", "feedback", "descent"), found, strict=False))
        log.info("%s: %d bits, %s, groups of %d: %s", name, *form[:3], steps)
    return codes[:, across.argsort()][:, :, down.argsort()]


def damped(metric: Tensor) -> Tensor:
    """The metric (n, n) plus DAMPING times its mean diagonal, or more if rounding has made it indefinite; I if it is 0. Channels
    that were never active are thereby rounded to nearest."""
    mean, share = metric.diagonal().mean(), DAMPING
    if not mean > 0:
        return torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    while share <= 1:
        shifted = metric.clone()
        shifted.diagonal().add_(share * mean)
        if int(torch.linalg.cholesky_ex(shifted.flip(0, 1)).info) == 0:
            return shifted
        share *= 10
    raise FloatingPointError("the metric is indefinite, even with its mean diagonal added")


def gram_feedback(weight: Tensor, grids: Grids, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Changes D (S, m, n) by GPTQ, from the first column to the last, for a positive definite C = `columns` (n, n), and their
    tr(D C D^T) (S,)."""
    count, m, n = grids.scales.shape
    root = upper_root(columns)
    pull = pull_of(root)
    targets = weight.T[:, None].expand(n, count, m).reshape(n, -1).clone()
    scales, zeros = (part.permute(2, 0, 1).reshape(n, -1) for part in (grids.scales, grids.zeros))
    low, high = (part[:, None].expand(count, m).reshape(-1) for part in (grids.low, grids.high))
    divisors, change = scales.masked_fill(scales == 0, math.inf), targets.clone().neg_()
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        targets[begin:end].addmm_(pull[:begin, begin:end].T, change[:begin])
        for top in range(begin, end, INNER):
            below = min(top + INNER, end)
            targets[top:below].addmm_(pull[begin:top, top:below].T, change[begin:top])
            for j in range(top, below):
                value = torch.addcdiv(zeros[j], targets[j], divisors[j]).round_().clamp_(low, high).sub_(zeros[j]).mul_(scales[j])
                change[j] += value
                targets[j] -= value
                targets[j + 1 : below].addcmul_(pull[j, j + 1 : below, None], change[j])
    errors = targets.mul_(root.diagonal()[:, None]).square_().unflatten(1, (count, m)).sum((0, 2))
    return change.unflatten(1, (count, m)).permute(1, 2, 0), errors


def objective(change: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """(S,): tr(F D C D^T) of changes D (S, m, n); F = I without `rows`."""
    return ((change if rows is None else rows @ change) * (change @ columns)).sum((1, 2))
