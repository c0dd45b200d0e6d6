"""Neurons of an FFN y = W_down h + b, h = act(W_up x + b_up) or act(W_gate x) * (W_up x): their scores and their order.

Neuron j is row j of gate and up, and column j of down; its contribution to the output is h_j W_down[:, j].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.numerics.linalg import regularized, square_root

if TYPE_CHECKING:
    from winnow.structures.base import Problem


def order_of(problem: Problem, criterion: str, seed: int, ridge: float = 1e-4) -> Tensor:
    """(f,): the neurons from the most to the least important; ties by position.

    activation: root mean square of h_j (FFSplit). activation_x_row: the same times ||W_down[:, j]||, the size of the neuron's
    contribution to the output. weight_norm: norm of all weights of the neuron. leverage: ridge leverage score
    [C (C + ridge * mean(C_jj) I)^{-1}]_jj with C = E[h h^T] (MoDeGPT). output, loss: `by_gain`, for the error of the output or
    for the predicted loss. lowest: the reverse of activation. random: by `seed`.
    """
    *inner, down = problem.group
    weight = problem.weights[down.name]
    if criterion == "random":
        return torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.device)
    hidden = problem.sites[down.name] if criterion != "weight_norm" else {}
    if criterion in ("output", "loss"):
        return by_gain(weight, hidden["gram"], problem.outputs[down.name]["gradient_gram"] if criterion == "loss" else None)
    if criterion == "activation":
        score = hidden["rms"]
    elif criterion == "lowest":
        score = -hidden["rms"]
    elif criterion == "activation_x_row":
        score = hidden["rms"] * weight.norm(dim=0)
    elif criterion == "weight_norm":
        parts = [problem.weights[m.name].square().sum(1) for m in inner]
        score = (weight.square().sum(0) + sum(parts)).sqrt()
    else:
        gram = hidden["gram"]
        shifted = regularized(gram, ridge, "the second moment of the hidden units")
        score = torch.linalg.solve(shifted, gram).diagonal()
    return score.argsort(descending=True, stable=True)


def by_gain(weight: Tensor, gram: Tensor, rows: Tensor | None) -> Tensor:
    """(f,): neurons in the order of greedy forward selection: each step takes the neuron that lowers most the error
    tr(R D C D^T) of the best linear prediction W' h_S of W h from the selected neurons S, with D = W' - W.

    `weight` W (d, f), `gram` C = E[h h^T] (f, f), `rows` R (d, d), or None for I. In exact arithmetic this is a Cholesky
    factorisation of C with pivots chosen by gain: with the Schur complement S of C and T = R^{1/2} W S, neuron j gains
    T_j^T T_j / S_jj. Neurons that the selected ones determine, up to rounding, come last, by position.

    A step computes the pivot's row of S from the factor and subtracts its part from T, for the remaining neurons: f^3 / 3 +
    4 d f^2 operations in total; with R, 2 d^2 f more and an eigendecomposition of a (d, d) matrix.
    """
    rounding = len(gram) * torch.finfo(gram.dtype).eps
    floor = rounding * gram.diagonal().mean()
    root = weight if rows is None else square_root(rows) @ weight
    targets, left = gram @ root.T, gram.diagonal().clone()  # (f, d), a row per neuron; S_jj
    factor, open_ = (
        torch.zeros_like(gram),
        torch.arange(len(gram), device=gram.device),
    )  # (remaining, selected or more); neurons
    order: list[int] = []
    while len(open_):
        free = torch.ones(len(open_), dtype=torch.bool, device=gram.device)
        for taken in range(len(order), len(order) + -(-len(open_) // 8)):  # after that, rows of selected neurons are dropped
            gained = torch.linalg.vector_norm(targets, dim=1).square() / left
            gained = gained.where(free & (left > floor), -torch.inf)
            best = int((gained >= gained.max() * (1 - rounding)).int().argmax())  # the first of those equal up to rounding
            if gained[best] == -torch.inf:
                return torch.tensor([*order, *open_[free].tolist()], device=gram.device)
            row = gram[open_[best], open_] - factor[:, :taken] @ factor[best, :taken]
            targets.addr_(row / left[best], targets[best].clone(), alpha=-1)
            factor[:, taken] = row / left[best].sqrt()
            left -= factor[:, taken].square()
            order.append(int(open_[best]))
            free[best] = False
        targets, left, factor, open_ = targets[free], left[free], factor[free], open_[free]
    return torch.tensor(order, device=gram.device)


def permuted(problem: Problem, order: Tensor) -> dict[str, Tensor]:
    """The FFN's weights and biases with its neurons in `order`: `{role}.weight`, `{role}.bias`; its outputs do not change."""
    *inner, down = problem.group
    found = {f"{down.role}.weight": problem.weights[down.name][:, order]}
    for m in inner:
        found[f"{m.role}.weight"] = problem.weights[m.name][order]
        if m.name in problem.biases:
            found[f"{m.role}.bias"] = problem.biases[m.name][order]
    if down.name in problem.biases:
        found[f"{down.role}.bias"] = problem.biases[down.name]
    return found


def left_out(products: Tensor) -> Tensor:
    """(f + 1,): error[s] = sum of products[i, j] over i, j >= s, the error if only the first s neurons are kept. `products`
    (f, f): second moments of the neurons' contributions to the output."""
    tail = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([tail, tail.new_zeros(1)]).clamp(min=0)


def affine_map(problem: Problem, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares affine map of the FFN's input to its hidden units: B (f, d), constant (f,), and the second moment
    (f, f) of its residual. Needs gram and mean of both, and cross = E[h x^T]."""
    *inner, down = problem.group
    x, h = problem.sites[inner[-1].name], problem.sites[down.name]
    covariance = regularized(x["gram"] - torch.outer(x["mean"], x["mean"]), ridge, "the covariance of the FFN's input")
    cross = h["cross"] - torch.outer(h["mean"], x["mean"])
    maps = torch.linalg.solve(covariance, cross.T).T
    plain = x["gram"] - torch.outer(x["mean"], x["mean"])
    left = h["gram"] - torch.outer(h["mean"], h["mean"]) - maps @ cross.T - cross @ maps.T + maps @ plain @ maps.T
    return maps, h["mean"] - maps @ x["mean"], (left + left.T) / 2
