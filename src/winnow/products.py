"""Products over tokens, for statistics and fits; apart from the fits, so that an edit of those asks for no new statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_of(x: Tensor, other: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x^T x (n, n) of x (t, n), or x^T y with `other` y (t, d), made in `dtype` (by default that of x).

    On a CPU by NumPy, which makes half of x^T x and mirrors it (BLAS's syrk), and whose BLAS is the faster one on AMD. On a GPU
    numbers of 16 bits are multiplied as they are and summed in float32, which is exact but for the sums.
    """
    dtype, other = dtype or x.dtype, x if other is None else other
    if x.device.type == "cuda" and dtype == torch.float32 and x.dtype == other.dtype and x.dtype.itemsize == 2:
        return torch.mm(x.T, other, out_dtype=dtype)
    x, other = x.to(dtype), other.to(dtype) if other is not x else None
    if x.device.type != "cpu":
        return x.T @ (x if other is None else other)
    array = x.numpy()
    return torch.from_numpy(array.T @ (array if other is None else other.numpy()))
