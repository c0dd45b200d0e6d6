"""Rounding to nearest on a symmetric grid: the numbers of a row as integers, with one scale for every `group` of its inputs.

Everywhere below the last inputs of a row may be fewer than `group`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def scales_of(weight: Tensor, bits: int, group: int) -> Tensor:
    """(m, groups) float64: the steps between grid points from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1 that put the largest number
    of every group of a matrix (m, n) at an end. Raises ValueError below 2 bits."""
    if bits < 2:
        raise ValueError(f"{bits} bits have no symmetric grid but 0")
    return _grouped(weight.double(), group).abs().amax(2) / (2 ** (bits - 1) - 1)


def in_float16(scales: Tensor) -> Tensor:
    """The scales rounded up to float16: rounded down, the largest number of a group could fall off the end of the grid.

    Raises ValueError for a scale that float16 does not reach."""
    nearest = scales.half()
    # The next pattern of bits is the next number.
    found = (nearest.view(torch.int16) + (nearest.double() < scales)).view(torch.float16)
    if not torch.isfinite(found).all():
        raise ValueError(f"a scale of {float(scales.max()):.3g} is too large for float16, which holds the scales")
    return found


def steps_of(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """(m, n) float64, whole numbers: how many steps of its scale each number of the matrix is nearest to."""
    steps = (_grouped(weight.double(), group) / scales.double().clamp(min=1e-300)[..., None]).round()
    return steps.flatten(1)[:, : weight.shape[1]]


def multiplied(steps: Tensor, scales: Tensor, group: int) -> Tensor:
    """(m, n): steps times their scales, in the dtype of both."""
    return (_grouped(steps, group) * scales[..., None]).flatten(1)[:, : steps.shape[1]]


def packed(steps: Tensor) -> Tensor:
    """(m, ceil(n / 2)) uint8: whole numbers (m, n) from -8 to 7 two to a byte, the first in its lower half."""
    codes = (functional.pad(steps, (0, steps.shape[1] % 2)) + 8).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpacked(codes: Tensor, columns: int) -> Tensor:
    """(m, columns) int8: what `packed` packed."""
    return torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :columns].to(torch.int8) - 8


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """(m, groups, group), zeros behind the last inputs."""
    return functional.pad(matrix, (0, -matrix.shape[1] % group)).reshape(len(matrix), -1, group)
