"""Rotations of the last axis of n numbers by V = T diag(signs): random signs, then a transform T (n, n), which is orthogonal.

With n = k * 2^p and k odd, T = C (x) H is the Kronecker product of the discrete cosine transform C (k, k) (type II, orthonormal)
and the Walsh-Hadamard matrix H (2^p, 2^p) over 2^(p / 2), which is itself the Kronecker product of smaller ones. T is applied
one Kronecker factor after the other: n (d_1 + d_2 + ...) multiplications for factors of d_1, d_2, ... rows instead of n^2.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ODD = 256  # the largest k, whose factor is multiplied as a dense matrix
TOGETHER = 7  # powers of two of the largest Hadamard factor
SEEDS = {"inputs": 0, "outputs": 1}  # of the signs of each side


def odd_part(n: int) -> int:
    """k of n = k * 2^p."""
    return n // (n & -n)


def rotatable(n: int) -> bool:
    """Whether n channels are rotated: k is at most `ODD`."""
    return odd_part(n) <= ODD


def factors_of(n: int) -> list[int]:
    """The rows of each Kronecker factor of T; empty for n = 1. Raises ValueError if n is not `rotatable`."""
    if not rotatable(n):
        raise ValueError(f"{n} channels are not rotated: their odd part, {odd_part(n)}, is larger than {ODD}")
    k, p = odd_part(n), (n & -n).bit_length() - 1
    count = -(-p // TOGETHER)
    return [*([k] if k > 1 else []), *(2 ** (p * (i + 1) // count - p * i // count) for i in range(count))]


def rotated(x: Tensor, signs: Tensor) -> Tensor:
    """V x for every row of x (..., n); signs (n,), +-1, of the same dtype."""
    return _transformed(x * signs, back=False)


def rotated_back(x: Tensor, signs: Tensor) -> Tensor:
    """V^T x for every row of x (..., n): the inverse of `rotated`."""
    return _transformed(x, back=True) * signs


def _transformed(x: Tensor, back: bool) -> Tensor:
    """T x, or T^T x, for every row of x (..., n)."""
    after = 1  # channels that a step of the factor's index passes over
    for size in reversed(factors_of(x.shape[-1])):
        factor = _factor(size, x.dtype, x.device)
        factor = factor.mT if back else factor
        if after == 1:  # one product for all rows
            x = (x.unflatten(-1, (-1, size)) @ factor.mT).flatten(-2)
        else:
            x = (factor @ x.unflatten(-1, (-1, size, after))).flatten(-3)
        after *= size
    return x


def _factor(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    if torch.compiler.is_compiling():
        return _made(size, dtype, device)
    return _kept(size, dtype, device)


@cache
def _kept(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    with torch.inference_mode(False):  # tensors made in inference mode could not be used for gradients later
        return _made(size, dtype, device)


def _made(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size): C if the size is odd, otherwise H."""
    import torch

    index = torch.arange(size, dtype=torch.float64, device=device)
    if size % 2:
        turns = index[:, None] * (2 * index + 1) % (4 * size)  # exact; 4 size are a whole turn
        found = torch.cos(turns * (math.pi / (2 * size))) * math.sqrt(2 / size)
        found[0] *= math.sqrt(0.5)
        return found.to(dtype)
    found = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return (found / math.sqrt(size)).to(dtype)


def signs_of(side: str, n: int) -> Tensor:
    """(n,) float64, +-1: the signs of a side, `inputs` or `outputs`; all matrices of this width have the same."""
    import torch

    generator = torch.Generator().manual_seed(SEEDS[side])
    return 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1


def packed_signs(signs: Tensor) -> Tensor:
    """(ceil(n / 8),) uint8: a bit for every sign, 1 for -1, lowest first."""
    import torch
    from torch.nn import functional

    bits = functional.pad(signs < 0, (0, -len(signs) % 8)).unflatten(0, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpacked_signs(stored: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(n,) +-1: the inverse of `packed_signs`."""
    import torch

    bits = (stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device)) & 1
    return 1 - 2 * bits.flatten()[:n].to(dtype)
