"""A compressed model whose replaced FFNs have their dense matrices beside them, on the same inputs: what these matrices read and
how the loss depends on what they give is then known around the compressed model, though it has none of their shapes.

The outputs are those of the compressed model, and so are all gradients outside of the dense FFNs. In them stands the gradient
that their matrices' outputs would have if the FFN's output were theirs.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from winnow.models.architectures import Matrix
from winnow.structures.ffn import FUSED


class Replaced(threading.local):
    """An FFN as it is stored: its modules by role and its activation, and the input that the dense one read last, in each thread
    its own: parts of a batch run side by side (winnow/calibration/threads.py)."""

    def __init__(self, modules: dict[str, nn.Module], activation: nn.Module):
        self.modules, self.activation = modules, activation
        self.input: Tensor | None = None

    def output(self) -> Tensor:
        """Of the input that this thread read last, which is then forgotten."""
        assert self.input is not None
        x, own, self.input = self.input, self.modules, None
        if FUSED in own:
            gate, up = own[FUSED](x).chunk(2, dim=-1)
        elif "gate_proj" in own:
            gate, up = own["gate_proj"](x), own["up_proj"](x)
        else:
            return own["down_proj"](self.activation(own["up_proj"](x)))
        return own["down_proj"](self.activation(gate) * up)


class Inner(nn.Module):
    """A dense matrix of the FFN's input, which passes no gradient on to that."""

    def __init__(self, dense: nn.Module, replaced: Replaced):
        super().__init__()
        self.dense = dense
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        self.replaced.input = x
        return self.dense(x.detach().requires_grad_())


class Down(nn.Module):
    """The dense matrix of the hidden units, whose output is that of the FFN as it is stored."""

    def __init__(self, dense: nn.Module, replaced: Replaced):
        super().__init__()
        self.dense = dense
        self.replaced = replaced

    def forward(self, hidden: Tensor) -> Tensor:
        unused = self.dense(hidden)
        return self.replaced.output() + (unused - unused.detach())


def put_beside(model: Any, group: list[Matrix], dense: dict[str, nn.Module]) -> None:
    """Put the modules of an FFN, `dense` by name with that of the activation, beside what stands in their places."""
    down = group[-1]
    stored = {m.role: model.get_submodule(m.module) for m in group}
    replaced = Replaced(stored, model.get_submodule(down.activation))
    modules = {m.module: (Down if m is down else Inner)(dense[m.module], replaced) for m in group}
    for name, module in (modules | {down.activation: dense[down.activation]}).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
