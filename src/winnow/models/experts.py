"""Mixtures of experts with one module per expert; transformers stores all experts of a layer in two 3-D parameters.

Separate modules allow statistics of each expert's own tokens, and checkpoints in which only some experts are compressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.models.architectures import ARCHITECTURES, FFN_ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Expert(nn.Module):
    """y = down (act(gate x) * up x), with the matrices named as in the family's files."""

    def __init__(self, names: dict[str, str], width: int, hidden: int, activation: nn.Module, **where: Any):
        super().__init__()
        self.names = names
        for role in ("gate_proj", "up_proj"):
            self.add_module(names[role], nn.Linear(width, hidden, bias=False, **where))
        self.add_module(names["down_proj"], nn.Linear(hidden, width, bias=False, **where))
        self.act_fn = activation
        self.tokens: Tensor | None = None  # indices of the batch's tokens in its last input

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(self.names[role]) for role in ("gate_proj", "up_proj", "down_proj"))
        return down(self.act_fn(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """All experts of a layer: for every token the weighted sum of the experts that the router selected."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, d); top_k_index and top_k_weights (tokens, k) -> (tokens, d)."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = (top_k_index == number).nonzero().unbind(-1)
            if len(token):
                expert.tokens = token
                y = expert(hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, y.to(total.dtype))
        return total


def unfuse(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, with every fused experts module replaced by `Experts` whose parameters are views, not copies."""
    family = ARCHITECTURES.get(model.config.model_type)
    if family is None or not family.experts:
        return model
    names = {role: family.expert_modules[role] for role in FFN_ROLES if role in family.expert_modules}
    fused = [n for n, m in model.named_modules() if n.endswith(f".{family.experts}") and not isinstance(m, Experts)]
    for name in fused:
        old: Any = model.get_submodule(name)
        count, width, hidden = old.down_proj.shape
        where = {"device": "meta", "dtype": old.down_proj.dtype}
        new = Experts(Expert(names, width, hidden, old.act_fn, **where) for _ in range(count))
        if old.down_proj.device.type != "meta":
            for number, expert in enumerate(new):
                gate, up = old.gate_up_proj.data[number].chunk(2)
                for role, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", old.down_proj.data[number])):
                    expert.get_submodule(names[role]).weight = nn.Parameter(weight)  # type: ignore[assignment]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model
