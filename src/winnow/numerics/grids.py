"""Quantisation grids of a matrix: (code - zero) * scale, with one scale (and one zero point if the grid has them) for every
group of inputs of a row. The last group of a row may be smaller.

`symmetric`: codes from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1. `full`: all 2^bits codes from -2^(bits - 1); the sign of the
scale puts the extra code on the side of the group's largest number. `asymmetric`: codes from 0 and an integer zero point, both
at most 2^bits - 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from winnow.numerics.hadamard import rotatable

if TYPE_CHECKING:
    from torch import Tensor

SHARES = [1 - step / 20 for step in range(11)]  # factors tried on the scale that reaches a group's largest number
ON_CPU, ON_GPU = 1 << 16, 1 << 24  # numbers of a matrix for which scales are searched at a time: passes over more take longer
FEW_BITS = [1 - step / 20 for step in range(14)]  # the same, for grids of as few as three or four points


class Form(NamedTuple):
    """How the numbers of a matrix are stored."""

    bits: int
    grid: str
    group: int
    rotation: str = "none"  # or `inputs` or `both`, see `winnow.numerics.hadamard`

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 2 ** (self.bits - 1)
        return {"symmetric": (1 - half, half - 1), "full": (-half, half - 1), "asymmetric": (0, 2 * half - 1)}[self.grid]

    @property
    def offset(self) -> int:
        """What is subtracted from a code or a zero point before it is stored as a signed number of that many bits."""
        return 2 ** (self.bits - 1) if self.grid == "asymmetric" else 0

    def row_bytes(self, columns: int) -> int:
        """Stored bytes of a row: codes, float16 scales, and zero points of as many bits as the codes."""
        groups = -(-columns // self.group)
        zeros = -(-groups * self.bits // 8) if self.grid == "asymmetric" else 0
        return -(-columns * self.bits // 8) + 2 * groups + zeros

    def bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a matrix: its rows, and a bit for every rotated channel."""
        signs = {"none": [], "inputs": [columns], "both": [columns, rows]}[self.rotation]
        return rows * self.row_bytes(columns) + sum(-(-width // 8) for width in signs)


def forms_of(
    rows: int, columns: int, bits: list[int], grids: list[str], groups: list[int | None], rotations: list[str]
) -> list[Form]:
    """All distinct forms of a matrix (rows, columns), sorted by bytes and then in the order of bits, groups, grids and rotations.
    A group is at most one row; None means the whole row. A side that is not `rotatable` is left as it is."""
    widths = dict.fromkeys(min(group or columns, columns) for group in groups)
    possible = {"none": "none", "inputs": "inputs" if rotatable(columns) else "none"}
    possible["both"] = "both" if rotatable(columns) and rotatable(rows) else possible["inputs"]
    turns = dict.fromkeys(possible[rotation] for rotation in rotations)
    every = [Form(number, grid, width, turn) for number in bits for width in widths for grid in grids for turn in turns]
    return sorted(every, key=lambda form: form.bytes(rows, columns))


def scaled(weight: Tensor, form: Form, search: str, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(scales float16, zero points float64), both (m, groups), of a matrix (m, n).

    `search`: `largest`, the grid reaches the largest number of its group; `searched`, the scale is multiplied by that factor of
    `SHARES` with the least squared error, inputs weighted by `columns` (n,); `unbiased`, the same with `FEW_BITS`, every scale
    first adjusted so that the projection of the rounded group onto the group is the group itself: least squares shrinks it, and
    a matrix that is smaller everywhere changes the loss to first order.

    Raises ValueError for a scale above the largest float16.
    """
    import torch

    at_once = max(1, (ON_CPU if weight.device.type == "cpu" else ON_GPU) // weight.shape[1])
    made = [_scaled(rows, form, search, columns) for rows in weight.split(at_once)]
    scales, zeros = (torch.cat(parts) for parts in zip(*made, strict=True))
    return scales, zeros


def _scaled(weight: Tensor, form: Form, search: str, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same for some rows, which are independent."""
    import torch

    from winnow.numerics.rounding import grouped, in_float16

    parts, weights = grouped(weight.double(), form.group), grouped(columns.expand_as(weight), form.group)
    low, high = form.codes
    if form.grid == "asymmetric":
        top, bottom = parts.amax(2).clamp(min=0), parts.amin(2).clamp(max=0)
        whole, sign = (top - bottom) / high, None
    elif form.grid == "full":
        largest = parts.gather(2, parts.abs().argmax(2, keepdim=True))[:, :, 0]
        whole, sign, bottom = largest.abs() / -low, -largest.sign(), None
    else:
        whole, sign, bottom = parts.abs().amax(2) / high, None, None

    def made(share: float) -> tuple[Tensor, Tensor, Tensor]:
        scales = in_float16(share * whole)
        if sign is not None:
            scales = scales * sign.half()
        steps = scales.double()[..., None]
        zeros = torch.zeros_like(whole)
        if bottom is not None:
            zeros = (-share * bottom / _divisible(scales.double())).round().clamp(low, high)
        codes = (parts / _divisible(steps) + zeros[..., None]).round().clamp(low, high) - zeros[..., None]
        if search == "unbiased":
            own, kept = (parts.square() * weights).sum(2), (parts * codes * weights).sum(2)
            scales = torch.where(kept * scales > 0, own / torch.where(kept == 0, 1, kept), scales.double()).half()
            steps = scales.double()[..., None]
        return scales, zeros, ((parts - codes * steps).square() * weights).sum(2)

    scales, zeros, error = made(1.0)
    least = torch.full_like(error, math.inf)
    for share in {"largest": [], "searched": SHARES, "unbiased": FEW_BITS}[search]:
        found, points, error = made(share)
        better = error < least
        scales, zeros, least = (torch.where(better, *both) for both in ((found, scales), (points, zeros), (error, least)))
    return scales, zeros


def _divisible(scales: Tensor) -> Tensor:
    """The scales with 1 in place of 0, where all numbers of the group are 0."""
    return scales.where(scales != 0, 1)
