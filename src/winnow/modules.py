"""The modules that a compressed checkpoint is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = left (right x) + b, with right (k, in) and left (out, k), both plain `nn.Linear` (so LoRA finds them).

    `weight` is an empty tensor. It costs no byte, and makes plain transformers refuse the checkpoint by a size mismatch
    instead of filling the layer with random numbers.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__()
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features, bias=bias)
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


class SumLinear(nn.Module):
    """y = kept(x) + rest(x); the bias is that of `kept`. `weight` is empty, as in `LowRankLinear`."""

    def __init__(self, kept: nn.Module, rest: nn.Module):
        super().__init__()
        self.kept = kept
        self.rest = rest
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x) + self.rest(x)


class RowsLinear(nn.Module):
    """y = [right x; left right x][order] + b: `right` (k, in) gives k outputs, `left` (out - k, k) the others from them."""

    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__()
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        index = torch.int16 if out_features < 2**15 else torch.int32
        self.register_buffer("order", torch.empty(out_features, dtype=index))
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.right(x)
        y = torch.cat([rows, self.left(rows)], dim=-1).index_select(-1, self.order.int())
        return y if self.bias is None else y + self.bias
