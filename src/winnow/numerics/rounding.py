"""Rounding to nearest on a symmetric grid with one scale for every `group` inputs of a row, and packing of the codes of any grid
(see `winnow.numerics.grids`).

The last group of a row may be smaller in all functions below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def scales_of(weight: Tensor, bits: int, group: int) -> Tensor:
    """(m, groups) float64: step sizes with which the largest number of every group of a matrix (m, n) is the last point of the
    grid -(2^(bits - 1) - 1) ... 2^(bits - 1) - 1. Raises ValueError below 2 bits."""
    if bits < 2:
        raise ValueError(f"{bits} bits: a symmetric grid needs at least 2")
    return grouped(weight.double(), group).abs().amax(2) / (2 ** (bits - 1) - 1)


def in_float16(scales: Tensor) -> Tensor:
    """The scales rounded up to float16: rounded down, the largest number of a group could lie outside the grid.

    Raises ValueError for a scale above the largest float16."""
    nearest = scales.half()
    # The next pattern of bits is the next number.
    found = (nearest.view(torch.int16) + (nearest.double() < scales)).view(torch.float16)
    if not torch.isfinite(found).all():
        raise ValueError(f"a scale of {float(scales.max()):.3g} is too large for float16, in which scales are stored")
    return found


def steps_of(weight: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """(m, n) float64 integers: the nearest grid point of every number of the matrix, in steps of its scale."""
    steps = (grouped(weight.double(), group) / scales.double().clamp(min=1e-300)[..., None]).round()
    last = 2 ** (bits - 1) - 1
    return steps.clamp(-last, last).flatten(1)[:, : weight.shape[1]]


def multiplied(steps: Tensor, scales: Tensor, group: int, zeros: Tensor | None = None) -> Tensor:
    """(m, n): (steps - zeros) * scales, each group with its own; all in one dtype."""
    parts = grouped(steps, group)
    if zeros is not None:
        parts = parts - zeros[..., None]
    return (parts * scales[..., None]).flatten(1)[:, : steps.shape[1]]


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a packed row of `columns` numbers. Raises ValueError unless bits are 2 to 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: only 2 to 8 are supported")
    return -(-columns * bits // 8)


def packed(steps: Tensor, bits: int) -> Tensor:
    """(m, packed_width): integers (m, n) of a grid of 2 to 8 bits, packed. With 8 bits they are stored as int8; with fewer,
    2^(bits - 1) is added and the bits of a row are concatenated in uint8, lowest first."""
    if bits == 8:
        return steps.to(torch.int8)
    places = _places(bits)
    codes = functional.pad(steps, (0, -steps.shape[1] % len(places))) + 2 ** (bits - 1)
    codes = codes.to(torch.uint8).unflatten(1, (-1, len(places)))
    runs = codes.new_zeros(*codes.shape[:2], len(places) * bits // 8)
    for index, (byte, before) in enumerate(places):
        runs[:, :, byte] |= codes[:, :, index] << before
        if before + bits > 8:
            runs[:, :, byte + 1] |= codes[:, :, index] >> (8 - before)
    return runs.flatten(1)[:, : packed_width(steps.shape[1], bits)].contiguous()


def unpacked(stored: Tensor, columns: int, bits: int) -> Tensor:
    """(m, columns) int8: the inverse of `packed`."""
    if bits == 8:
        return stored
    places = _places(bits)
    if short := -stored.shape[1] % (len(places) * bits // 8):
        stored = functional.pad(stored, (0, short))
    runs, parts = stored.unflatten(1, (-1, len(places) * bits // 8)), []
    for byte, before in places:
        part = runs[:, :, byte] >> before
        if before + bits > 8:
            part |= runs[:, :, byte + 1] << (8 - before)
        parts.append(part & (2**bits - 1))
    return torch.stack(parts, dim=2).flatten(1)[:, :columns].to(torch.int8) - 2 ** (bits - 1)


def _places(bits: int) -> list[tuple[int, int]]:
    """(byte, bit offset) at which each number begins, for the smallest count of numbers that fills whole bytes."""
    return [divmod(bits * index, 8) for index in range(8 // math.gcd(8, bits))]


def grouped(matrix: Tensor, group: int) -> Tensor:
    """(m, groups, group), padded with zeros at the end."""
    short = -matrix.shape[1] % group
    return (functional.pad(matrix, (0, short)) if short else matrix).reshape(len(matrix), -1, group)  # padding copies
