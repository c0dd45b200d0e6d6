"""GRC, the shared basis of q, k and v (HyperTensor Paper I): its basis as published, its bytes, and exact columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SINKS = 32 / 4096  # share of exact columns: the paper's largest T relative to the width of its model


def basis(stack: Tensor, power: int = 1) -> Tensor:
    """(n, n): eigenvectors of (M^T M)^power of the stacked matrix M (sum m, n), leading ones first. The paper uses the fourth
    power, which has the same eigenvectors."""
    import torch

    gram = stack.T @ stack
    raised = gram / gram.norm()
    for _ in range(power - 1):
        raised = raised @ gram
        raised = raised / raised.norm()
    return torch.linalg.eigh((raised + raised.T) / 2).eigenvectors.flip(1)


def projected_error(stack: Tensor, directions: Tensor) -> float:
    """||M - M P P^T||^2 / ||M||^2 for orthonormal columns P (n, k)."""
    rest = stack - (stack @ directions) @ directions.T
    return float(rest.square().sum() / stack.square().sum())


def sink_gain(stack: Tensor, k: int) -> float:
    """Reduction of the squared error in % if the columns with the largest norms are exact and the others share a basis, with the
    rank lowered such that no more is stored: T M + k' (n - T + M) <= k (n + M) for T columns of M rows."""
    rows, n = stack.shape
    kept = max(1, round(SINKS * n))
    rank = (k * (n + rows) - kept * rows) // (n - kept + rows)
    rest = stack[:, stack.square().sum(0).argsort(descending=True)[kept:]]
    left = projected_error(rest, basis(rest)[:, : max(0, rank)]) * float(rest.square().sum() / stack.square().sum())
    return 100 * (1 - left / projected_error(stack, basis(stack)[:, :k]))
