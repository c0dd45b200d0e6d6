"""Neurons of an FFN y = W_down h + b, h = act(W_up x + b_up) or act(W_gate x) * (W_up x): their scores and their order.

Neuron j is row j of gate and up, and column j of down; its contribution to the output is h_j W_down[:, j].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from winnow.numerics.linalg import regularized, square_root

if TYPE_CHECKING:
    from winnow.structures.base import Problem

Criterion = Literal["activation", "activation_x_row", "weight_norm", "leverage", "output", "loss", "random", "lowest"]


def statistics_of(criterion: str) -> tuple[str, ...]:
    """Statistics of the hidden units that a criterion needs, and of the loss's gradient in the output."""
    if criterion == "loss":
        return ("gram", "gradient_gram")
    needs = {"activation": ("rms",), "activation_x_row": ("rms",), "lowest": ("rms",), "leverage": ("gram",), "output": ("gram",)}
    return needs.get(criterion, ())


def order_of(problem: Problem, criterion: str, seed: int, ridge: float = 1e-4) -> Tensor:
    """(f,): the neurons from the most to the least important; ties by position.

    activation: root mean square of h_j (FFSplit). activation_x_row: the same times ||W_down[:, j]||, the size of what the
    neuron adds to the output. weight_norm: norm of all weights of the neuron. leverage: ridge leverage score
    [C (C + ridge * mean(C_jj) I)^{-1}]_jj with C = E[h h^T] (MoDeGPT). output, loss: as `by_gain`, in the error of the output or
    in the loss that it is predicted to cost. lowest: the reverse of activation. random: by `seed`.
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
    """(f,): neurons in the order in which one after the other, each time the one that gains most, lowers the error
    tr(R D C D^T) of the best prediction of W h from those taken, D being what the prediction lacks of W.

    `weight` W (d, f), `gram` C = E[h h^T] (f, f), `rows` R (d, d), or None for I. In exact arithmetic this is a Cholesky
    factorisation of C with pivots by gain: of what is left, S of C and T = R^{1/2} W S of the outputs, neuron j gains
    T_j^T T_j / S_jj. Neurons that those taken determine, to rounding, come last, by position.

    A step forms the pivot's row of S from the factor so far and takes its part out of T, both of the neurons that are left:
    f^3 / 3 + 4 d f^2 operations in all, with R 2 d^2 f and an eigendecomposition of (d, d) besides.
    """
    rounding = len(gram) * torch.finfo(gram.dtype).eps
    floor = rounding * gram.diagonal().mean()
    root = weight if rows is None else square_root(rows) @ weight
    targets, left = gram @ root.T, gram.diagonal().clone()  # (f, d), a row per neuron; S_jj
    factor, open_ = torch.zeros_like(gram), torch.arange(len(gram), device=gram.device)  # (open, taken so far and room); neurons
    order: list[int] = []
    while len(open_):
        free = torch.ones(len(open_), dtype=torch.bool, device=gram.device)
        for taken in range(len(order), len(order) + -(-len(open_) // 8)):  # then rows of those taken are dropped
            gained = torch.linalg.vector_norm(targets, dim=1).square() / left
            gained = gained.where(free & (left > floor), -torch.inf)
            best = int((gained >= gained.max() * (1 - rounding)).int().argmax())  # the first of those that are equal, to rounding
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
    """The FFN's weights and biases with its neurons in `order`: `{role}.weight`, `{role}.bias`; the function is the same."""
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
    """error[s] = sum of products[i, j] over i, j >= s (f + 1,): what is lost if the first s neurons are kept, from the
    matrix of products of the neurons' contributions to the output."""
    tail = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([tail, tail.new_zeros(1)]).clamp(min=0)


def affine_map(problem: Problem, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares affine map of the FFN's input to its hidden units: B (f, d), constant (f,), and the second moment
    (f, f) of what it leaves of them (around no other constant). Needs gram and mean of both, and cross = E[h x^T]."""
    *inner, down = problem.group
    x, h = problem.sites[inner[-1].name], problem.sites[down.name]
    covariance = regularized(x["gram"] - torch.outer(x["mean"], x["mean"]), ridge, "the covariance of the FFN's input")
    cross = h["cross"] - torch.outer(h["mean"], x["mean"])
    maps = torch.linalg.solve(covariance, cross.T).T
    plain = x["gram"] - torch.outer(x["mean"], x["mean"])
    left = h["gram"] - torch.outer(h["mean"], h["mean"]) - maps @ cross.T - cross @ maps.T + maps @ plain @ maps.T
    return maps, h["mean"] - maps @ x["mean"], (left + left.T) / 2
