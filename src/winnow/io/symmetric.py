"""Symmetric matrices (n, n) in files: only the lower triangle, row by row, as one vector of n (n + 1) / 2 numbers."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOWER = ":lower"  # the end of the names of such vectors
ROWS = 256  # rows that are mirrored at a time


def halved(tensors: dict[str, Tensor], kinds: Collection[str]) -> dict[str, Tensor]:
    """The same tensors, with `{name}:lower` in place of the matrices whose last component of the name is in `kinds`."""
    chosen = {name for name, tensor in tensors.items() if tensor.dim() == 2 and name.rpartition(".")[2] in kinds}
    return {f"{k}{LOWER}" if k in chosen else k: lower_of(t) if k in chosen else t for k, t in tensors.items()}


def lower_of(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix (n, n)."""
    n = len(matrix)
    lower = matrix.new_empty(n * (n + 1) // 2)
    for row in range(n):
        begin = row * (row + 1) // 2
        lower[begin : begin + row + 1] = matrix[row, : row + 1]
    return lower


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix (n, n) of a lower triangle. Raises ValueError if no n has that many numbers."""
    n = (math.isqrt(8 * len(lower) + 1) - 1) // 2
    if n * (n + 1) // 2 != len(lower):
        raise ValueError(f"{len(lower)} numbers are not a triangle")
    matrix = lower.new_empty(n, n)
    for row in range(n):
        begin = row * (row + 1) // 2
        matrix[row, : row + 1] = lower[begin : begin + row + 1]
    for begin in range(0, n, ROWS):
        end = min(begin + ROWS, n)
        inside = matrix[begin:end, begin:end]
        matrix[begin:end, begin:end] = inside.tril() + inside.tril(-1).T
        matrix[:begin, begin:end] = matrix[begin:end, :begin].T
    return matrix
