"""FFNs in which channels pass the activation unchanged, in an engine that always applies its activation.

`affine_block` and `split_affine` replace the activation of an FFN by one that passes some channels. vLLM's FFNs apply theirs to
all channels, and the matrices around it undo that without an approximation:

- With a gate, the product is act(g) u. For g = 32, act(g) = 32 in every dtype, so that u / 32 gives u.
- Without a gate, act(z) - act(-z) = z for ReLU, SiLU and all forms of GELU, so that z and -z are computed, and subtracted after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from winnow.errors import InputError
from winnow.numerics.modules import Constant

SATURATED = 32.0  # a power of two, so that the division is exact


@dataclass(frozen=True)
class Passing:
    """The role of a matrix in such an FFN, and how many channels have the activation; the channels after them pass."""

    part: str  # gate, up or down
    gated: bool
    active: int

    def around(self, module: nn.Module) -> nn.Module:
        """The module with what undoes the activation."""
        if self.part == "gate":
            for inner in module.modules():
                if isinstance(inner, Constant) and inner.value == 1:
                    inner.value = SATURATED
            return module
        if self.part == "up":
            return Divided(module, self.active) if self.gated else Mirrored(module, self.active)
        return module if self.gated else Subtracted(module, self.active)


class Divided(nn.Module):
    """The outputs of `inner`, those after the first `active` divided by 32."""

    def __init__(self, inner: nn.Module, active: int):
        super().__init__()
        self.inner, self.active = inner, active

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.cat([y[..., : self.active], y[..., self.active :] / SATURATED], dim=-1)


class Mirrored(nn.Module):
    """[a; z; -z] for the outputs [a; z] of `inner`, with `active` outputs a."""

    def __init__(self, inner: nn.Module, active: int):
        super().__init__()
        self.inner, self.active = inner, active

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.cat([y, -y[..., self.active :]], dim=-1)


class Subtracted(nn.Module):
    """`inner` of [a; z - w] for the input [a; z; w], with `active` channels a, and as many z as w."""

    def __init__(self, inner: nn.Module, active: int):
        super().__init__()
        self.inner, self.active = inner, active

    def forward(self, x: Tensor) -> Tensor:
        half = (x.shape[-1] - self.active) // 2
        first, positive, negative = x.split([self.active, half, half], dim=-1)
        return self.inner(torch.cat([first, positive - negative], dim=-1))


def passing_of(model: nn.Module, layers: dict[str, dict[str, Any]]) -> dict[str, Passing]:
    """{module: its role} of the FFNs of a dense model in which channels will pass, from the layouts of a checkpoint.

    Raises InputError, naming the activation's module, where the identities above do not hold: for another activation, or where
    gate and up are one matrix."""
    found = {}
    for name, layout in layers.items():
        if layout.get("part") != "activation":
            continue
        parent = name.rpartition(".")[0]
        ffn = {module: own for module, own in layers.items() if module.startswith(f"{parent}.") and own["kind"] == layout["kind"]}
        parts = {own.get("part"): module for module, own in ffn.items()}
        gated = "gate" in parts
        if "up" not in parts or "down" not in parts:
            raise InputError(
                f"{name}: vLLM cannot run {layout['kind']} where gate and up are one matrix; load it with transformers"
            )
        if not _undone(model.get_submodule(name), gated):
            raise InputError(
                f"{name}: vLLM cannot run {layout['kind']} with the activation {type(model.get_submodule(name)).__name__}; load "
                "the checkpoint with transformers"
            )
        for part in {"gate", "up", "down"} & set(parts):
            found[parts[part]] = Passing(part, gated, layout.get("exact", 0))
    return found


def _undone(activation: nn.Module, gated: bool) -> bool:
    """Whether the identity for FFNs with or without a gate holds for this activation."""
    try:
        if gated:
            return bool(activation(torch.tensor([SATURATED])) == SATURATED)
        z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
        return bool(torch.allclose(activation(z) - activation(-z), z, rtol=0, atol=1e-12))
    except RuntimeError:  # not an activation
        return False
