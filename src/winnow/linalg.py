"""Weighted low-rank approximation in float64: the one routine that every factorising method goes through."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
EPSILON = torch.finfo(torch.float64).eps


class Directions(NamedTuple):
    """A fit of every rank: W_k = left[:, :k] @ (right[:k] @ W), with singular values (K,) and squared errors (K + 1,)."""

    left: Tensor  # (m, K)
    right: Tensor  # (K, m)
    spectrum: Tensor
    error: Tensor


def regularized(gram: Tensor, ridge: float, what: str) -> Tensor:
    """gram + ridge * mean(diagonal) * I, for a full (n, n) or diagonal (n,) gram that has to be inverted.

    The ridge is raised tenfold until a Cholesky factorisation exists, and every raise is logged. Raises FloatingPointError,
    naming `what`, if the gram is not finite, all zero, or cannot be mended by a ridge of 1 % of its mean diagonal.
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
    """A symmetric root S (n, n) of a positive semi-definite matrix, S S = gram; negative rounding is cut to 0."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def leading_directions(weight: Tensor, columns: Tensor, precision: float = EPSILON, rows: Tensor | None = None) -> Directions:
    """Directions that solve min over rank(B) <= k of ||R^{1/2} (W - B) C^{1/2}||_F for every k at once.

    `weight` (m, n), `columns` (the metric C as its diagonal (n,) or in full (n, n)) and `rows` (R likewise, positive
    definite; None for I) are float64; `precision` is the relative rounding error that a full C was computed with. With U
    the left singular vectors of R^{1/2} W C^{1/2}, left = R^{-1/2} U and right = U^T R^{1/2}.

    Neither Cholesky nor an inverse of C is needed, and a singular C is no special case: directions beyond the rank of
    W C^{1/2} cost nothing in the metric and are spent on what is left of W itself, so rank K = min(m, n) gives W back. The
    eigenproblem has the smaller side of W. (methods: T2, T3; Swift-SVD for the left side.)

    Raises FloatingPointError if an input is not finite or R is not positive.
    """
    for name, value in (("the weight", weight), ("the metric", columns), ("the metric of the outputs", rows)):
        if value is not None and not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite")
    if rows is None:
        left, spectrum, error = _leading(weight, columns, precision)
        return Directions(left, left.T, spectrum, error)
    if rows.dim() == 1:
        if not (rows > 0).all():
            raise FloatingPointError("the metric of the outputs is not positive")
        root = rows.sqrt()
        left, spectrum, error = _leading(root[:, None] * weight, columns, precision)
        return Directions(left / root[:, None], left.T * root, spectrum, error)
    values, vectors = torch.linalg.eigh(rows)
    if not values[0] > 0:
        raise FloatingPointError("the metric of the outputs is not positive definite")
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    left, spectrum, error = _leading(root @ weight, columns, precision)
    return Directions(inverse @ left, left.T @ root, spectrum, error)


def _leading(weight: Tensor, columns: Tensor, precision: float) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal left singular vectors (m, K) of W C^{1/2}, singular values, and squared errors left, for R = I."""
    m, n = weight.shape
    # Squared singular values below this share of the largest are rounding noise of the metric or of the eigensolver.
    noise = max(m, n) * EPSILON + (16 * precision if precision > EPSILON else 0)
    if columns.dim() == 1:
        scaled = weight * columns.clamp(min=0).sqrt()
        u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
        noise = (max(m, n) * EPSILON) ** 2
    elif m <= n:
        values, vectors = torch.linalg.eigh(weight @ columns @ weight.T)
        u, s = vectors.flip(1), values.flip(0).clamp(min=0).sqrt()
    else:
        scaled = weight @ square_root(columns)
        values, vectors = torch.linalg.eigh(scaled.T @ scaled)
        s = values.flip(0).clamp(min=0).sqrt()
        u = torch.linalg.qr(scaled @ vectors.flip(1)).Q
    squared = s.square()
    rank = int((squared > noise * squared[0]).sum()) if squared[0] > 0 else 0
    u = _complete(u[:, :rank], weight, min(m, n))
    tail = torch.cat([squared.flip(0).cumsum(0).flip(0), squared.new_zeros(1)])
    return u, s, tail


def truncation_errors(weight: Tensor, left: Tensor, right: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """(K + 1,): tr(R D C D^T) with D = W - left[:, :k] right[:k], for every k from 0 to K, in float64.

    `weight` (m, n), `left` (m, K), `right` (K, n), `columns` C (n, n), `rows` R (m, m), both positive semi-definite.
    """
    cross = weight @ columns
    return residual_errors(cross @ weight.T, cross, left, right, columns, rows)


def residual_errors(target: Tensor, cross: Tensor, left: Tensor, right: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """(K + 1,): E[e^T R e] with e = y - left[:, :k] right[:k] x, for every k from 0 to K, in float64.

    `target` E[y y^T] (m, m), `cross` E[y x^T] (m, n), `columns` C = E[x x^T] (n, n), `left` (m, K), `right` (K, n), `rows` R
    (m, m). No map is formed: tr(R E[y y^T]) - 2 sum over i < k of (L^T R E[y x^T] B^T)_ii + sum over i, j < k of
    (L^T R L)_ij (B C B^T)_ij, with L = left and B = right; the last are sums over leading blocks, so all sizes cost what one
    does.
    """
    inner, outer = right @ columns, rows @ left
    start = (rows * target).sum()
    products = ((right @ cross.T) * outer.T).sum(1).cumsum(0)
    blocks = ((left.T @ outer) * (inner @ right.T)).cumsum(0).cumsum(1).diagonal()
    return torch.cat([start[None], start - 2 * products + blocks]).clamp(min=0)


def principal_components(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `leading_directions` with R = I, but the rank-k map is W P_k P_k^T with P_k the leading eigenvectors of C (n, n).

    Returns the rows P^T (K, n), K = min(m, n); the roots of the eigenvalues of C; and the squared error
    ||W (I - P_k P_k^T) C^{1/2}||_F^2 left at rank 0..K. Raises ValueError for a diagonal C, which has no components.
    """
    if columns.dim() == 1:
        raise ValueError("principal components of the inputs need the metric `gram`")
    for name, value in (("the weight", weight), ("the metric", columns)):
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite")
    values, vectors = torch.linalg.eigh(columns)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    lost = values * (weight @ vectors).square().sum(0)
    tail = torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])
    width = min(weight.shape)
    return vectors[:, :width].T, values[:width].sqrt(), tail[: width + 1]


def pivot_rows(left: Tensor) -> Tensor:
    """Indices (k,) of k well-conditioned rows of `left` (m, k), by Gaussian elimination with partial pivoting: the rows'
    block is invertible, and every other row is a combination of them with moderate coefficients.

    Raises FloatingPointError if `left` has not full rank.
    """
    lu, pivots = torch.linalg.lu_factor(left)
    if not (lu.diagonal().abs() > EPSILON * left.abs().max()).all():
        raise FloatingPointError("the factors have not full rank; choose a smaller rank")
    order = torch.arange(len(left))
    for step, pivot in enumerate((pivots - 1).tolist()):
        order[[step, pivot]] = order[[pivot, step]]
    return order[: left.shape[1]].sort().values


def _complete(u: Tensor, weight: Tensor, width: int) -> Tensor:
    """`u` followed by the leading directions of what it leaves of `weight`, `width` columns in all."""
    missing = width - u.shape[1]
    if missing == 0:
        return u
    rest = weight - u @ (u.T @ weight)
    extra = torch.linalg.svd(rest, full_matrices=False).U[:, :missing]
    # Where the rest has no more directions, SVD fills up with vectors that may lie in the span of u. Householder QR keeps
    # the span of every leading block and gives orthonormal columns all the same.
    return torch.linalg.qr(torch.cat([u, extra], dim=1)).Q
