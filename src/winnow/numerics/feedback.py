"""Rounding with error feedback: codes that make tr(F D C D^T), D = Q - W, small, instead of the nearest code of every number.

With F = I rows are independent, and the rule is GPTQ's (arXiv 2210.17323): columns are rounded one after the other, and the
error of each is compensated in the columns that follow. With a full F it is compensated in the rows as well: with C = R R^T and
F = S S^T, both roots upper triangular, the objective is ||S^T D R||^2, whose entry (i, j) is S_ii R_jj (D_ij + a term of the
entries rounded before); entry by entry it is made as small as the grid allows (LDL feedback on both sides, as in YAQA, arXiv
2505.22988). Coordinate descent follows.

Several grids of one matrix are rounded at once: the first axis of `scales` and `zeros` has S grids.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.numerics.grids import Form

log = logging.getLogger(__name__)
BLOCK = 128  # columns (and rows) rounded one by one before a matrix product applies their errors to all others
DAMPING = 0.01  # added to the diagonals of C and F, as a share of their means
PARTS = 2  # parts of a column in coordinate descent
DENSE = 8  # one in so many rows of a part moves


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
        codes = gram_feedback(weight, grids, columns)
        errors.append(objective(grids.values(codes) - weight, rows, columns))
    else:
        fed = grids.values(both_feedback(weight, grids, rows, columns)) - weight
        errors.append(objective(fed, rows, columns))
        change = torch.where((errors[1] < errors[0])[:, None, None], fed, change)
        for _ in range(sweeps):
            change = descend_codes(weight, grids, rows, columns, change)
        errors.append(objective(change, rows, columns))
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


def upper_root(metric: Tensor) -> Tensor:
    """R (n, n), upper triangular, with R R^T = metric."""
    return torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1)


def gram_feedback(weight: Tensor, grids: Grids, columns: Tensor) -> Tensor:
    """Codes (S, m, n) by GPTQ, from the first column to the last, for a positive definite C = `columns` (n, n)."""
    (count, m, n) = grids.scales.shape
    identity = torch.eye(n, dtype=weight.dtype, device=weight.device)
    inverse = torch.linalg.solve_triangular(upper_root(columns), identity, upper=True)
    targets = weight.T[:, None].expand(n, count, m).reshape(n, -1).clone()
    scales, zeros = (part.permute(2, 0, 1).reshape(n, -1) for part in (grids.scales, grids.zeros))
    low, high = (part[:, None].expand(count, m).reshape(-1) for part in (grids.low, grids.high))
    codes = torch.empty_like(targets)
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        errors = torch.empty_like(targets[begin:end])
        for j in range(begin, end):
            codes[j] = _codes(targets[j], scales[j], zeros[j], low, high)
            errors[j - begin] = (targets[j] - (codes[j] - zeros[j]) * scales[j]) / inverse[j, j]
            targets[j + 1 : end].addr_(inverse[j, j + 1 : end], errors[j - begin], alpha=-1)
        targets[end:].addmm_(inverse[begin:end, end:].T, errors, alpha=-1)
    return codes.reshape(n, count, m).permute(1, 2, 0)


def both_feedback(weight: Tensor, grids: Grids, rows: Tensor, columns: Tensor) -> Tensor:
    """Codes (S, m, n) with errors fed back along rows and columns, for F = `rows` (m, m) and C = `columns` (n, n), both positive
    definite. Entries go from the first column to the last, and in a column from the first row to the last."""
    count, m, n = grids.scales.shape
    root, across = upper_root(columns), upper_root(rows)
    pull = -(root / root.diagonal()).triu(1)
    inverse = torch.linalg.solve_triangular(across, torch.eye(m, dtype=across.dtype, device=across.device), upper=True)
    feed = (inverse / inverse.diagonal()[:, None]).triu(1)
    change = weight.new_zeros(m, count, n)
    codes = torch.empty_like(change)
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        base = weight[:, None, begin:end] + change[:, :, :begin] @ pull[:begin, begin:end]  # (m, S, columns)
        scales, zeros = (part[:, :, begin:end].permute(1, 0, 2) for part in (grids.scales, grids.zeros))
        rest = weight.new_zeros(end - begin, count, m)  # residuals of the targets after rounding, last column first
        for top in range(0, m, BLOCK):
            below = min(top + BLOCK, m)
            above = rest[:, :, :top] @ feed[:top, top:below]  # (columns, S, rows)
            tile = (base[top:below] + above.flip(0).permute(2, 1, 0)).contiguous()
            found = _tile(
                tile, weight[top:below, begin:end], scales[top:below].contiguous(), zeros[top:below].contiguous(),
                grids.low, grids.high, pull[begin:end, begin:end], feed[top:below, top:below],
            )  # fmt: skip
            codes[top:below, :, begin:end], change[top:below, :, begin:end], rest[:, :, top:below] = found
    return codes.permute(1, 0, 2)


def _tile(
    base: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, low: Tensor, high: Tensor, pull: Tensor, feed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, D, rest) of a tile. An entry depends on the entries to its left and above it, so that all entries of an
    antidiagonal are rounded at once. All are (m, S, n) except `rest` (n, S, m), last column first.
    """
    m, count, n = base.shape
    change, codes, rest = torch.zeros_like(base), torch.empty_like(base), base.new_zeros(n, count, m)
    dense = weight[:, None].expand(m, count, n).contiguous()
    left, above = pull.T.flip(0).contiguous()[:, :, None], feed.T.contiguous()[:, :, None]
    for step in range(m + n - 1):
        first, last = max(0, step - n + 1), min(m - 1, step)
        many, back = last + 1 - first, n - 1 - step + first
        where = ((many, count), (count * n - 1, n), first * count * n + step - first)
        target = _view(base, *where) + torch.bmm(change[first : last + 1], left[back : back + many])[:, :, 0]
        target += torch.bmm(rest[back : back + many], above[first : last + 1])[:, :, 0]
        scale, zero = _view(scales, *where), _view(zeros, *where)
        code = _codes(target, scale, zero, low, high)
        value = (code - zero) * scale
        _view(codes, *where).copy_(code)
        _view(change, *where).copy_(value - _view(dense, *where))
        _view(rest, (many, count), (count * m + 1, m), back * count * m + first).copy_(value - target)
    return codes, change, rest


def _view(tensor: Tensor, shape: tuple[int, int], strides: tuple[int, int], begin: int) -> Tensor:
    """A strided view into a contiguous tensor, which may itself have an offset in its memory."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + begin)


def objective(change: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """(S,): tr(F D C D^T) of changes D (S, m, n); F = I without `rows`."""
    return ((change if rows is None else rows @ change) * (change @ columns)).sum((1, 2))


def descend_codes(weight: Tensor, grids: Grids, rows: Tensor, columns: Tensor, change: Tensor) -> Tensor:
    """Changes D (S, m, n) after one sweep of coordinate descent on tr(F D C D^T), which never raises it.

    Every column is updated in PARTS, each of every PARTS-th row. Either all numbers of a part move to their best codes at once,
    or only the best one does, whichever lowers the objective more.
    """
    change = change.permute(1, 0, 2).clone(memory_format=torch.contiguous_format)  # (m, S, n)
    product, low, high = change @ columns, grids.low, grids.high
    parts = [slice(part, None, PARTS) for part in range(min(PARTS, len(weight)))]
    halves = [rows[own].contiguous() for own in parts]
    for begin in range(0, columns.shape[1], BLOCK):
        end = min(begin + BLOCK, columns.shape[1])
        inside = product[:, :, begin:end].reshape(len(rows), -1)  # one product of matrices, not one for every column
        slopes = (rows @ inside).unflatten(1, (-1, end - begin)).permute(2, 0, 1).contiguous()
        # (columns, m, S): half the gradient; for the remaining columns it includes all moves so far
        scales, zeros = (part[:, :, begin:end].permute(2, 1, 0).contiguous() for part in (grids.scales, grids.zeros))
        start = change[:, :, begin:end].permute(2, 0, 1).contiguous()
        now = start.clone()
        for k, j in enumerate(range(begin, end)):
            heights, before = rows.diagonal() * columns[j, j], slopes[k].clone()
            for own, half in zip(parts, halves, strict=True):
                point, slope, height = weight[own, j, None] + now[k][own], slopes[k][own], heights[own][:, None]
                scale, zero = scales[k][own], zeros[k][own]
                step = (_codes(point - slope / height, scale, zero, low, high) - zero) * scale - point
                gain = -(2 * slope + height * step) * step
                step = step.where(gain > 0, 0)
                moved = step.any(1).nonzero()[:, 0]
                if not len(moved):
                    continue
                if DENSE * len(moved) > len(step):  # selecting rows would take longer than multiplying by zeros
                    bent = columns[j, j] * (half.T @ step)  # (m, S): change of the slopes by all moves
                else:
                    bent = columns[j, j] * (half[moved].T @ step[moved])
                joint = -(step * (2 * slope + bent[own])).sum(0)
                best, where = gain.max(0)
                alone = torch.zeros_like(step).scatter_(0, where[None], step.gather(0, where[None]))
                single = columns[j, j] * half[where].T * alone.gather(0, where[None])
                together = joint > best
                now[k][own] += step.where(together, alone)
                slopes[k] += bent.where(together, single)
            turned = (slopes[k] - before) / columns[j, j]  # F times the column's moves
            slopes[k + 1 :] += columns[j, j + 1 : end, None, None] * turned
        product += (now - start).permute(1, 2, 0) @ columns[begin:end]
        change[:, :, begin:end] = now.permute(1, 2, 0)
    return change.permute(1, 0, 2)
