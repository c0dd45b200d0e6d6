"""Coordinate descent on tr(F D C D^T) over the codes of a rounded matrix, for all its grids at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from winnow.numerics.feedback import Grids

BLOCK, INNER = 128, 16  # columns before a product of matrices applies their moves to all others, and to the rest of the block
PARTS = 2  # parts of a column
DENSE = 3  # if one in so many numbers of a part would move, products with all of them take less time than selecting


def descend_codes(
    weight: Tensor, grids: Grids, rows: Tensor, columns: Tensor, change: Tensor, slopes: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Changes D (S, m, n) after some sweeps of coordinate descent on tr(F D C D^T), which never raise it, and by how much they
    have lowered it (S,). `slopes`: F D C (S, m, n) of `change`.

    Every column is updated in PARTS, each of every PARTS-th row. Either all numbers of a part move to their best codes at once,
    or only the best one does, whichever lowers the objective more.
    """
    (count, m, n), high = change.shape, -(-len(weight) // PARTS)
    short = high * PARTS - m
    order = torch.arange(high * PARTS, device=weight.device).view(high, PARTS).T  # rows by parts
    scales, zeros, values, slopes = (
        functional.pad(part.permute(2, 1, 0), (0, 0, 0, short)).unflatten(1, (high, PARTS)).transpose(1, 2).contiguous()
        for part in (grids.scales, grids.zeros, weight + change, slopes)
    )  # (n, PARTS, rows of a part, S); a row that is added has scale 0, and does not move
    divisors = scales.masked_fill(scales == 0, math.inf)
    padded = functional.pad(rows, (0, short, 0, short))
    padded.diagonal()[m:] = 1
    padded = padded[order.flatten()][:, order.flatten()]
    halves = padded.unflatten(0, (PARTS, high))  # rows of F for the moves of a part
    own = [half[:, part * high : (part + 1) * high].contiguous() for part, half in enumerate(halves)]
    energy = padded.diagonal().reshape(PARTS, high, 1)
    lowered = weight.new_zeros(count)
    turned = slopes.new_zeros(n, high * PARTS * count)  # F times the moves of every column when it was last updated
    for sweep in range(sweeps):
        for begin in range(0, n, BLOCK):
            end = min(begin + BLOCK, n)
            before = slopes[begin:end].flatten(1)
            before.addmm_(columns[begin:end, :begin], turned[:begin])
            if sweep:
                before.addmm_(columns[begin:end, end:], turned[end:])
            turned[begin:end] = 0
            now = before.clone()
            for top in range(begin, end, INNER):
                below = min(top + INNER, end)
                current = now[top - begin : below - begin]
                current.addmm_(columns[top:below, begin:top], turned[begin:top])
                for j in range(top, below):
                    heights, slope, turn = columns[j, j] * energy, current[j - top].view(PARTS, high, count), turned[j]
                    for part in range(PARTS):
                        grid = values[j, part], scales[j, part], divisors[j, part], zeros[j, part], grids.low, grids.high
                        found = _moves(*grid, slope[part], heights[part], columns[j, j], own[part])
                        if found is not None:
                            moved, steps, gain = found
                            values[j, part].index_add_(0, moved, steps)
                            lowered += gain
                            bent = halves[part].index_select(0, moved).T @ steps  # (rows, S)
                            turn += bent.flatten()
                            slope.view(-1, count).add_(bent, alpha=float(columns[j, j]))
                    current[j - top + 1 :].addcmul_(columns[j, j + 1 : below, None], turn)
            before.addmm_(columns[begin:end, begin:end], turned[begin:end])
    found = values.transpose(1, 2).flatten(1, 2)[:, :m].permute(2, 1, 0) - weight
    return found, lowered


def _moves(
    value: Tensor,
    scale: Tensor,
    divisor: Tensor,
    zero: Tensor,
    low: Tensor,
    high: Tensor,
    slope: Tensor,
    height: Tensor,
    energy: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(rows that move, their steps (.., S), by how much the objective becomes lower (S,)) for the numbers (k, S) of a part, with
    half the gradient `slope`, half the curvature `height`, and the part's own rows and columns of F (k, k).
    None if nothing moves."""
    code = torch.addcdiv(value, slope, height, value=-1).div_(divisor).add_(zero).round_().clamp_(low, high)
    step = code.sub_(zero).mul_(scale).sub_(value)
    loss = torch.addcmul(slope, height, step, value=0.5).mul_(step)  # half of what a move alone adds to the objective
    worse = loss >= 0
    moved = (~worse.all(1)).nonzero()[:, 0]
    if not len(moved):
        return None
    step.masked_fill_(worse, 0)
    best, where = loss.min(0)
    some = step.index_select(0, moved)
    if DENSE * len(moved) > len(step):
        joint = (step * torch.addmm(slope, rows, step, alpha=0.5 * float(energy))).sum(0)
    else:
        bent = torch.addmm(slope.index_select(0, moved), rows.index_select(0, moved), step, alpha=0.5 * float(energy))
        joint = (some * bent).sum(0)
    together = joint < best
    if together.any():
        alone = some.where(moved[:, None] == where, 0)
        return moved, some.where(together, alone), -2 * torch.minimum(joint, best)
    return where, step[where].diagonal().diag(), -2 * best.clamp(max=0)


def slopes_of(change: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """F D C of changes D (S, m, n)."""
    return rows @ (change @ columns)
