"""Training of rounded matrices: their scales, and optionally their codes and zero points.

A scale is trained as its ratio to the initial one. A code or a zero point is trained as a real number, which is rounded in every
forward pass; its gradient is that of the unrounded number (straight-through). A code starts where the dense matrix lies on the
grid, but within the interval that is rounded to the initial code, so that numbers close to the border of two codes change first,
as in AutoRound, arXiv 2309.05516. Zero points are trained with codes only: with fixed codes, another zero point moves all numbers
of its group by a whole step. Every forward pass uses exactly the numbers that would be stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from winnow.numerics.modules import RoundedEmbedding, RoundedLinear
from winnow.numerics.rotated import RotatedLinear
from winnow.numerics.rounding import multiplied, packed
from winnow.recovery.base import Given
from winnow.recovery.reround import beside

INSIDE = 0.4  # the largest distance of an initial real number from its code


class TrainedRounding(nn.Module):
    """The matrix of a rounded module from trainable parameters: `ratio` (out, groups), and, for codes, `place` (out, in)
    and, if there are zero points, `origin` (out, groups)."""

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
        self.origin = nn.Parameter(zeros.clone()) if codes and zeros is not None else None

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(steps (out, in), scales (out, groups), zero points (out, groups) or None) as they would be stored, in float32."""
        steps, scale, zeros = self.fixed
        exact = scale * self.ratio
        scale = exact + (exact.half().float() - exact).detach()
        if self.place is not None:
            steps = self._integers(self.place)
        return steps, scale, zeros if self.origin is None else self._integers(self.origin)

    def _integers(self, real: Tensor) -> Tensor:
        """The nearest numbers of that many bits; gradients pass through the rounding."""
        end = 2 ** (self.bits - 1)
        inside = real.clamp(-end, end - 1)
        return inside + (inside.round() - inside).detach()

    def forward(self) -> Tensor:
        steps, scale, zeros = self.stored()
        return multiplied(steps, scale, self.group, zeros)


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
        with given.weights.block(given.dense, below.rstrip(".")) if codes and modules else nullcontext():
            for name, module in modules.items():
                known = codes and module.whole
                module.trained = TrainedRounding(module, codes, dense_matrix(given, name) if known else None)
                added += [f"{name}.trained.{key}" for key, _ in module.trained.named_parameters()]
        given.dtypes.update(dict.fromkeys(added, torch.float32))
        yield
        with torch.no_grad():
            for module in modules.values():
                steps, scale, zeros = cast(TrainedRounding, module.trained).stored()
                module.steps.copy_(packed(steps, module.bits))
                module.scale.copy_(scale.half().view(torch.int16))
                if zeros is not None:
                    module.zero.copy_(packed(zeros, module.bits))
    finally:
        for module in modules.values():
            module.trained = None
        for key in added:
            del given.dtypes[key]


def stored_tensors(given: Given, below: str = "") -> dict[str, Tensor]:
    """{name: integers} of all rounded matrices below a module (default: of the whole model) that the recovery changes."""
    found = rounded_modules(given, below).items()
    names = ("steps", "scale", "zero")
    return {f"{name}.{key}": getattr(module, key) for name, module in found for key in names[: 3 if module.zeros else 2]}


def dense_matrix(given: Given, name: str) -> Tensor | None:
    """The matrix (out, in) that the rounded module `name` approximates: the dense one, without what factors beside it give, and
    rotated if its inputs are; None for a part of another compressed module."""
    place, _, part = name.rpartition(".")
    around = given.model.get_submodule(place)
    if isinstance(around, RotatedLinear):
        found = dense_matrix(given, place)
        return None if found is None else around.rotation().matrix(found.float())
    kept = beside(around) if part == "rest" else None
    try:
        module = given.dense.get_submodule(name if kept is None else place)
    except AttributeError:
        return None
    weight = cast(Tensor, module.weight).detach()
    weight = weight.T if isinstance(module, Conv1D) else weight
    return weight if kept is None else (weight.double() - kept).float()
