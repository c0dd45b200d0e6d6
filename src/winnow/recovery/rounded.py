"""Training of rounded matrices: their scales, and optionally their codes.

A scale is trained as its ratio to the initial one. A code is trained as a real number, which is rounded in every forward pass;
its gradient is that of the unrounded number (straight-through). It starts where the dense matrix lies on the grid, but within the
interval that is rounded to the initial code, so that numbers close to the border of two codes change first, as in AutoRound,
arXiv 2309.05516. Every forward pass uses exactly the numbers that would be stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from winnow.numerics.modules import RoundedEmbedding, RoundedLinear
from winnow.numerics.rounding import multiplied, packed
from winnow.recovery.base import Given

INSIDE = 0.4  # the largest distance of an initial real number from its code


class TrainedRounding(nn.Module):
    """The matrix of a rounded module from trainable parameters: `ratio` (out, groups) and, for codes, `place` (out, in)."""

    def __init__(self, of: RoundedLinear, codes: bool, dense: Tensor | None):
        """`codes`: whether they are trained; `dense`: the matrix (out, in) before rounding, if it is known."""
        super().__init__()
        self.group, self.bits = of.group, of.bits
        self.fixed = of.parts()
        steps, scale, zeros = self.fixed
        self.ratio = nn.Parameter(torch.ones_like(scale))
        place = steps.clone()
        if dense is not None:
            widened = scale.repeat_interleave(of.group, 1)[:, : of.in_features]
            place = dense.float() / widened.where(widened != 0, 1)
            if zeros is not None:
                place += zeros.repeat_interleave(of.group, 1)[:, : of.in_features]
            place = place.clamp(steps - INSIDE, steps + INSIDE).where(widened != 0, steps)
        self.place = nn.Parameter(place) if codes else None

    def stored(self) -> tuple[Tensor, Tensor]:
        """(steps (out, in), scales (out, groups)) as they would be stored, in float32."""
        steps, scale, _ = self.fixed
        exact = scale * self.ratio
        scale = exact + (exact.half().float() - exact).detach()
        if self.place is not None:
            end = 2 ** (self.bits - 1)
            inside = self.place.clamp(-end, end - 1)
            steps = inside + (inside.round() - inside).detach()
        return steps, scale

    def forward(self) -> Tensor:
        return multiplied(*self.stored(), self.group, self.fixed[2])


def rounded_modules(given: Given, below: str = "") -> dict[str, RoundedLinear]:
    """{name: module} of the rounded matrices below a module (default: of the whole model) that the recovery trains: all but
    embeddings, and heads that are tied to them."""
    if getattr(given.options, "rounded", "fixed") == "fixed":
        return {}
    return {
        name: module
        for name, module in given.model.named_modules()
        if isinstance(module, RoundedLinear) and not isinstance(module, RoundedEmbedding) and name.startswith(below)
    }


@contextmanager
def trainable(given: Given, below: str = "") -> Iterator[None]:
    """Within it, the rounded matrices below a module have trainable parameters; at its end their state is stored in the modules'
    own tensors. After an exception these are unchanged."""
    modules = rounded_modules(given, below)
    codes = given.options.rounded == "codes"
    added = []
    try:
        for name, module in modules.items():
            module.trained = TrainedRounding(module, codes, dense_matrix(given.dense, name) if codes else None)
            added += [f"{name}.trained.{key}" for key, _ in module.trained.named_parameters()]
        given.dtypes.update(dict.fromkeys(added, torch.float32))
        yield
        with torch.no_grad():
            for module in modules.values():
                steps, scale = cast(TrainedRounding, module.trained).stored()
                module.steps.copy_(packed(steps, module.bits))
                module.scale.copy_(scale.half().view(torch.int16))
    finally:
        for module in modules.values():
            module.trained = None
        for key in added:
            del given.dtypes[key]


def stored_tensors(given: Given) -> dict[str, Tensor]:
    """{name: integers} of all rounded matrices that the recovery trains."""
    found = rounded_modules(given).items()
    return {f"{name}.{key}": getattr(module, key) for name, module in found for key in ("steps", "scale")}


def dense_matrix(dense: nn.Module, name: str) -> Tensor | None:
    """The dense matrix (out, in) that the module `name` replaces; None for a part of a compressed module."""
    try:
        module = dense.get_submodule(name)
    except AttributeError:
        return None
    weight = cast(Tensor, module.weight).detach()
    return weight.T if isinstance(module, Conv1D) else weight
