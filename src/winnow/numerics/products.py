"""Products over tokens, for statistics and fits. A module of its own, so that editing the fits does not recompute statistics."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

TOKENS = 2048  # per thread in a product; fixed, like PARTED, so that sums do not depend on the number of threads
PRODUCT = 1 << 22  # numbers of a product that are added at a time
PIECE = 1 << 20  # numbers processed at a time: larger copies are allocated by the system anew each time, which is slow
ROWS = 256  # rows of a sum that are finished at a time
ROWS_OF_GPU = 2048  # rows of a product: as fast as more (H200), and half of a symmetric product is skipped
PARTED = 1 << 22  # largest product (numbers) whose tokens are split: larger ones keep all threads busy and would need memory


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def one_thread_of_blas() -> AbstractContextManager[object]:
    """Context manager in which every NumPy product uses one thread."""
    return _blas().limit(limits=1)


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x^T y; for small products, every thread computes a part of the tokens. The threads of BLAS and torch wait in busy loops
    and slow each other down: together they are many times slower than either alone."""
    if x.shape[1] * y.shape[1] > PARTED:
        return x.T @ y
    parts = [slice(start, start + TOKENS) for start in range(0, max(1, len(x)), TOKENS)]

    def of(part: slice) -> np.ndarray:
        own = x[part]
        return own.T @ (own if y is x else y[part])  # BLAS makes half of x^T x where both are one array

    if (threads := min(torch.get_num_threads(), len(parts))) <= 1:
        return sum((of(part) for part in parts[1:]), start=of(parts[0]))
    with one_thread_of_blas():
        made = _pool(threads).map(of, parts)
        return sum(made, start=next(made))


def gram_of(x: Tensor, other: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x^T x (n, n) of x (t, n), or x^T y with `other` y (t, d), computed in `dtype` (default: that of x).

    On a CPU, NumPy computes half of x^T x and mirrors it (BLAS syrk); its BLAS is also the faster one on AMD. On a GPU, 16-bit
    numbers are multiplied as they are and summed in float32: only the sums are rounded.
    """
    dtype, other = dtype or x.dtype, x if other is None else other
    if x.device.type == "cuda" and dtype == torch.float32 and x.dtype == other.dtype and x.dtype.itemsize == 2:
        return torch.mm(x.T, other, out_dtype=dtype)
    x, other = x.to(dtype), other.to(dtype) if other is not x else None
    if x.device.type != "cpu":
        return x.T @ (x if other is None else other)
    array = x.numpy()
    return torch.from_numpy(_product(array, array if other is None else other.numpy()))


def add_product(
    total: Tensor, x: Tensor, y: Tensor, precision: torch.dtype, turn: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> None:
    """total += x^T y, computed in `precision`. Large products are added in blocks of rows, since the product and its float64 copy
    would be as large as `total`; of x^T x only the lower half, and without other threads in parallel."""
    cpu = total.device.type == "cpu"
    if cpu and total.numel() <= PRODUCT:
        product = gram_of(x, None if y is x else y, precision)
        with turn():
            total += product
        return
    step = max(1, PRODUCT // y.shape[1]) if cpu else ROWS_OF_GPU
    for begin in range(0, x.shape[1], step):
        rows, end = slice(begin, begin + step), min(begin + step, x.shape[1]) if y is x else y.shape[1]
        part = gram_of(x[:, rows], y[:, :end], precision)
        piece = max(1, PIECE // end) if cpu else step
        for into, added in zip(*(t.split(piece) for t in (total[rows, :end], part)), strict=True):
            into += added


def mean_of(total: Tensor, count: Tensor, precision: torch.dtype) -> Tensor:
    """A sum x x^T (n, n), of which the lower triangle is filled in, over `count`, in `precision` and symmetric; without a second
    copy of the sum."""
    mean = torch.empty_like(total, dtype=precision)
    for begin in range(0, len(mean), ROWS):
        part, end = slice(begin, begin + ROWS), min(begin + ROWS, len(mean))
        lower = (total[part, :end] / count).to(precision)
        lower[:, begin:] = lower[:, begin:].tril() + lower[:, begin:].tril(-1).T
        mean[part, :end] = lower
        mean[:begin, part] = lower[:, :begin].T
    return mean
