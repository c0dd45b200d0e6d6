"""Weighted low-rank approximation, the routine that every factorising method uses; all results are float64."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from winnow.numerics.products import gram_of

log = logging.getLogger(__name__)
EPSILON = torch.finfo(torch.float64).eps
# A root is only inverted if its smallest pivot is above this share of the largest: half of the digits remain then.
INVERTIBLE = EPSILON**0.5


class Directions(NamedTuple):
    """Fits of every rank up to K: W_k = left[:, :k] @ right[:k], with all singular values (s,) and squared errors (s + 1,), s the
    smaller side of W. `left` has orthonormal columns, up to the rounding of a float32 metric; the norms are in `right`.
    """

    left: Tensor  # (m, K)
    right: Tensor  # (K, n)
    spectrum: Tensor
    error: Tensor


def finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, by one sum instead of a mask as large as the tensor."""
    return math.isfinite(float(value.sum()))


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of at most eight blocks of n columns, each of at least 256. Without the blocks above its diagonal, a product
    with a symmetric or triangular matrix takes 9/16 of the operations."""
    step = max(256, -(-n // 8))
    return ((begin, min(begin + step, n)) for begin in range(0, n, step))


def sandwich(weight: Tensor, gram: Tensor) -> Tensor:
    """W G W^T (m, m) for a symmetric G (n, n), as W H W^T plus its transpose, where H is the lower half of G = H + H^T."""
    half = weight.new_zeros(len(weight), len(weight))
    for begin, end in blocks(len(gram)):
        part = weight[:, begin:end] @ (gram[begin:end, begin:end] / 2) + weight[:, end:] @ gram[end:, begin:end]
        half.addmm_(part, weight[:, begin:end].T)
    return half + half.T


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix; only its lower triangle is read.

    On a CPU this uses NumPy, whose LAPACK takes about half the time of PyTorch's (n = 2048, AMD EPYC). Drivers for a part of
    the spectrum (evr, evx) take as long as this one for half of it.
    """
    if matrix.device.type != "cpu":
        return torch.linalg.eigh(matrix)
    values, vectors = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


def left_singular(matrix: Tensor) -> Tensor:
    """The left singular vectors (m, min(m, n)) of a matrix (m, n), by descending singular values.

    On a CPU this uses NumPy: MKL, used by PyTorch, does not converge on some matrices of half rank, and OpenBLAS does. On others,
    of few directions, it is the other way round.
    """
    if matrix.device.type == "cpu":
        with suppress(np.linalg.LinAlgError):
            return torch.from_numpy(np.linalg.svd(matrix.numpy(), full_matrices=False)[0])
    return torch.linalg.svd(matrix, full_matrices=False).U


def regularized(gram: Tensor, ridge: float, what: str) -> Tensor:
    """gram + ridge * mean(diagonal) * I, for a full (n, n) or diagonal (n,) gram that is to be inverted.

    The ridge is raised tenfold until a Cholesky factorisation exists; every raise is logged. Raises FloatingPointError, naming
    `what`, if the gram is not finite, all zero, or singular even with a ridge of 1 % of its mean diagonal.
    """
    diagonal = gram.diagonal() if gram.dim() == 2 else gram
    scale = diagonal.mean()
    if not torch.isfinite(gram).all() or scale <= 0:
        raise FloatingPointError(f"{what}: {'is zero' if scale == 0 else 'not finite or negative'}; it cannot be inverted")
    used = ridge
    while used <= 0.01:
        shifted = gram + used * scale * (torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if gram.dim() == 2 else 1)
        definite = (shifted > 0).all() if gram.dim() == 1 else int(torch.linalg.cholesky_ex(shifted).info) == 0
        if definite:
            if used > ridge:
                log.warning("%s: singular, so the relative ridge was raised from %.1e to %.1e", what, ridge, used)
            return shifted
        used = max(10 * used, len(gram) * EPSILON)
    raise FloatingPointError(f"{what}: singular even with a ridge of 1 % of its mean diagonal")


def square_root(gram: Tensor) -> Tensor:
    """The symmetric root S (n, n) of a positive semi-definite matrix, S S = gram; negative eigenvalues are set to 0."""
    values, vectors = eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def leading_directions(
    weight: Tensor, columns: Tensor, precision: float = EPSILON, rows: Tensor | None = None, largest: int | None = None
) -> Directions:
    """Directions that minimise ||R^{1/2} (W - B) C^{1/2}||_F^2 over rank(B) <= k, for every k <= `largest` at once.

    `weight` (m, n), `columns` (the metric C as its diagonal (n,) or in full (n, n)) and `rows` (R in the same form, positive
    definite; None for I) are float64. `precision` is the relative rounding error of a full C: products with a float32 C are
    computed in float32, eigenproblems always in float64. With U the left singular vectors of R^{1/2} W C^{1/2},
    left = R^{-1/2} U and right = U^T R^{1/2} W.

    C may be singular: directions beyond the rank of W C^{1/2} do not change the error in the metric and approximate the
    residual of W itself, so that rank min(m, n) reproduces W. The eigenproblem has the size of the smaller side of W, and no
    root of C is computed if that is m. (methods: T2, T3; Swift-SVD for the left side.)

    Raises FloatingPointError if an input is not finite or R is not positive.
    """
    for name, value in (("the weight", weight), ("the metric", columns), ("the metric of the outputs", rows)):
        if value is not None and not finite(value):
            raise FloatingPointError(f"{name} is not finite")
    largest = min(weight.shape) if largest is None else min(largest, *weight.shape)
    if rows is None:
        return _leading(weight, columns, precision, largest)
    if rows.dim() == 1:
        if not (rows > 0).all():
            raise FloatingPointError("the metric of the outputs is not positive")
        root = rows.sqrt()[:, None]
        found = _leading(root * weight, columns, precision, largest)
        return found._replace(left=found.left / root)
    values, vectors = eigh(rows)
    if not values[0] > 0:
        raise FloatingPointError("the metric of the outputs is not positive definite")
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    found = _leading(root @ weight, columns, precision, largest)
    return found._replace(left=inverse @ found.left)


def _leading(weight: Tensor, columns: Tensor, precision: float, largest: int) -> Directions:
    """`leading_directions` for R = I."""
    m, n = weight.shape
    rounded = columns.dim() == 2 and precision > EPSILON
    dtype = torch.float32 if rounded else torch.float64
    own = weight.to(dtype)
    if columns.dim() == 1:
        root, divisible = columns.clamp(min=0).sqrt(), bool(columns.min() > INVERTIBLE * columns.max())
        scaled = own * root
    elif m > n:
        root, divisible = _root(columns)
        scaled = _times(own, root.to(dtype), divisible)
    if m > n or columns.dim() == 1:
        product = gram_of(scaled if m > n else scaled.T)
    else:
        product = _deflated_sandwich(weight, columns) if rounded else sandwich(weight, columns)
    values, vectors = eigh(product.double())
    squared = values.flip(0).clamp(min=0)
    s = squared.sqrt()
    # Squared singular values below this are noise: of the eigensolver; of W S where it should be 0, as after directions were
    # removed from W; and of a rounded metric, which turns as many zero eigenvalues negative as positive.
    largest_entry = (columns if columns.dim() == 1 else columns.diagonal()).max()
    rounding = max(m, n) * EPSILON
    noise = rounding * (squared[0] + rounding * weight.square().sum() * largest_entry)
    noise = noise + (2 * -values[0].clamp(max=0) if rounded else 0)
    tail = torch.cat([squared.flip(0).cumsum(0).flip(0), squared.new_zeros(1)])
    rank = min(largest, int((squared > noise).sum()))
    vectors = vectors[:, len(s) - rank :].flip(1)
    if m > n and rank == largest and divisible:
        # The error of W S V V^T S^{-1} in the metric depends on V alone, however the columns of W S V / s are rounded.
        left = scaled @ (vectors / s[:rank]).to(dtype)
        right = vectors.T * s[:rank, None]
        right = right / root if root.dim() == 1 else torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return Directions(left.double(), right, s, tail)
    u = torch.linalg.qr(scaled.double() @ vectors).Q if m > n else vectors
    u = _complete(u, weight, largest)
    return Directions(u, (u.T.to(dtype) @ own).double(), s, tail)


def _deflated_sandwich(weight: Tensor, gram: Tensor) -> Tensor:
    """W G W^T (m, m), float64, by float32 products whose rounding errors do not grow with the few largest eigenvalues of G, which
    massive activations make millions of times the others: G = Q S Q^T + rest, for any Q and S, with Q S Q^T in float64."""
    single = gram.to(torch.float32, copy=True)
    q = single[:, single.diagonal().topk(min(8, len(gram))).indices]
    for _ in range(2):
        q = torch.linalg.qr(single @ q).Q
    core = q.T @ (single @ q)
    core = (core + core.T) / 2
    rest = single.addmm_(q @ core, q.T, alpha=-1)
    outer = weight @ q.double()
    return sandwich(weight.float(), rest).double() + outer @ core.double() @ outer.T


def _root(gram: Tensor) -> tuple[Tensor, bool]:
    """(S, whether it is safe to invert), S S^T = gram: the Cholesky factor, or a symmetric root if that is not reliable."""
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal()
    if int(info) == 0 and pivots.min() ** 2 > INVERTIBLE * pivots.max() ** 2:
        return lower, True
    values, vectors = eigh(gram)
    return (vectors * values.where(values > -2 * values[0], 0).clamp(min=0).sqrt()) @ vectors.T, False


def _times(weight: Tensor, root: Tensor, lower: bool) -> Tensor:
    """W S (m, n), skipping the zeros of a lower triangular S."""
    if not lower:
        return weight @ root
    return torch.cat([weight[:, begin:] @ root[begin:, begin:end] for begin, end in blocks(len(root))], dim=1)


def truncation_errors(weight: Tensor, left: Tensor, right: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """(K + 1,): tr(R D C D^T) with D = W - left[:, :k] right[:k], for every k from 0 to K, in float64.

    `weight` (m, n), `left` (m, K), `right` (K, n), `columns` C (n, n), `rows` R (m, m), both positive semi-definite.
    """
    cross = weight @ columns
    return residual_errors(cross @ weight.T, cross, left, right, columns, rows)


def residual_errors(target: Tensor, cross: Tensor, left: Tensor, right: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """(K + 1,): E[e^T R e] with e = y - left[:, :k] right[:k] x, for every k from 0 to K, in float64.

    `target` E[y y^T] (m, m), `cross` E[y x^T] (m, n), `columns` C = E[x x^T] (n, n), `left` (m, K), `right` (K, n), `rows` R
    (m, m). No map is formed: the error is tr(R E[y y^T]) - 2 sum over i < k of (L^T R E[y x^T] B^T)_ii + sum over i, j < k of
    (L^T R L)_ij (B C B^T)_ij, with L = left and B = right. These are sums over leading blocks: all k cost as much as one.
    """
    inner, outer = right @ columns, rows @ left
    start = (rows * target).sum()
    products = ((right @ cross.T) * outer.T).sum(1).cumsum(0)
    blocks = ((left.T @ outer) * (inner @ right.T)).cumsum(0).cumsum(1).diagonal()
    return torch.cat([start[None], start - 2 * products + blocks]).clamp(min=0)


def weighted_error(rest: Tensor, columns: Tensor, rows: Tensor | None) -> Tensor:
    """(): tr(R D C D^T) of a change D = `rest` (m, n); C = `columns` and R = `rows` are full or diagonals; None for R = I."""
    weighted = rest if rows is None else rows[:, None] * rest if rows.dim() == 1 else rows @ rest
    return ((rest * columns if columns.dim() == 1 else rest @ columns) * weighted).sum().clamp(min=0)


def principal_components(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Like `leading_directions` with R = I, but the rank-k map is W P_k P_k^T with P_k the leading eigenvectors of C (n, n).

    Returns the rows P^T (K, n), K = min(m, n); the roots of the eigenvalues of C; and the squared errors
    ||W (I - P_k P_k^T) C^{1/2}||_F^2 of ranks 0..K. Raises ValueError for a diagonal C, which has no components.
    """
    if columns.dim() == 1:
        raise ValueError("principal components of the inputs need the metric `gram`")
    for name, value in (("the weight", weight), ("the metric", columns)):
        if not finite(value):
            raise FloatingPointError(f"{name} is not finite")
    values, vectors = eigh(columns)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    lost = values * (weight @ vectors).square().sum(0)
    tail = torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])
    width = min(weight.shape)
    return vectors[:, :width].T, values[:width].sqrt(), tail[: width + 1]


def pivot_rows(left: Tensor) -> Tensor:
    """Indices (k,) of k well-conditioned rows of `left` (m, k), by Gaussian elimination with partial pivoting: their block is
    invertible, and every other row is a combination of them with moderate coefficients.

    Raises FloatingPointError if `left` does not have full rank.
    """
    lu, pivots = torch.linalg.lu_factor(left)
    if not (lu.diagonal().abs() > EPSILON * left.abs().max()).all():
        raise FloatingPointError("the factors do not have full rank; choose a smaller rank")
    order = torch.arange(len(left))
    for step, pivot in enumerate((pivots - 1).tolist()):
        order[[step, pivot]] = order[[pivot, step]]
    return order[: left.shape[1]].sort().values


def _complete(u: Tensor, weight: Tensor, width: int) -> Tensor:
    """`u` followed by the leading directions of the part of `weight` outside its span, `width` columns in all."""
    missing = width - u.shape[1]
    if missing == 0:
        return u
    rest = weight - u @ (u.T @ weight)
    extra = left_singular(rest)[:, :missing]
    # If the residual has no more directions, SVD pads with vectors that may lie in the span of u. Householder QR keeps the
    # span of every leading block and returns orthonormal columns in any case.
    return torch.linalg.qr(torch.cat([u, extra], dim=1)).Q
