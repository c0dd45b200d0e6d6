"""Runs the dense matrices of replaced FFNs beside a compressed model, on its inputs. This gives statistics of their inputs and of
the gradients at their outputs around the compressed model, although it does not have these matrices.

Outputs, and gradients outside of the dense FFNs, are those of the compressed model. The dense matrices receive the gradients that
they would have if they computed the FFN's output.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from winnow.models.architectures import Matrix
from winnow.structures.ffn import FUSED


class Replaced(threading.local):
    """A stored FFN: its modules by role, its activation, and, per thread, the last input of the dense FFN; parts of a batch run
    in parallel threads (winnow/calibration/threads.py)."""

    def __init__(self, modules: dict[str, nn.Module], activation: nn.Module):
        self.modules, self.activation = modules, activation
        self.input: Tensor | None = None

    def output(self) -> Tensor:
        """The output for the last input of this thread, which is then dropped."""
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
    """A dense matrix applied to the FFN's input, without a gradient to that input."""

    def __init__(self, dense: nn.Module, replaced: Replaced):
        super().__init__()
        self.dense = dense
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        self.replaced.input = x
        return self.dense(x.detach().requires_grad_())


class Down(nn.Module):
    """The dense matrix of the hidden units; its output is replaced by that of the stored FFN."""

    def __init__(self, dense: nn.Module, replaced: Replaced):
        super().__init__()
        self.dense = dense
        self.replaced = replaced

    def forward(self, hidden: Tensor) -> Tensor:
        unused = self.dense(hidden)
        return self.replaced.output() + (unused - unused.detach())


def put_beside(model: Any, group: list[Matrix], dense: dict[str, nn.Module]) -> None:
    """Install the dense modules of an FFN (`dense`: by name, including the activation) beside the modules that replaced them."""
    down = group[-1]
    stored = {m.role: model.get_submodule(m.module) for m in group}
    replaced = Replaced(stored, model.get_submodule(down.activation))
    modules = {m.module: (Down if m is down else Inner)(dense[m.module], replaced) for m in group}
    for name, module in (modules | {down.activation: dense[down.activation]}).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
