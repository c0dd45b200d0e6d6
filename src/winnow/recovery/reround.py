"""Rounding again of the rounded matrices of a compressed model, for other targets and inputs than those that they were fitted to.

Bits, groups, grid, scales and zero points stay as they are stored: only codes change. A checkpoint does not say how its scales
were chosen, and the target is close enough to the dense matrix for them to fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from winnow.numerics.feedback import codes_of, metric_for
from winnow.numerics.grids import Form
from winnow.numerics.modules import LowRankLinear, RoundedLinear, SumLinear
from winnow.numerics.rotated import RotatedLinear, Rotation
from winnow.numerics.rounding import packed
from winnow.structures.rounded import SWEEPS

if TYPE_CHECKING:
    from torch import Tensor, nn


class Rounded(NamedTuple):
    """The rounded matrix of a compressed module: its name in the module, with a dot at its end, and its rotation."""

    matrix: RoundedLinear
    name: str
    rotation: Rotation


def rounded_of(module: nn.Module) -> Rounded | None:
    """The rounded matrix of a compressed module: the module itself, or the remainder beside low-rank factors, rotated or not;
    None if it has none."""
    name, rotation = "", Rotation(None, None)
    if isinstance(module, SumLinear) and isinstance(module.kept, LowRankLinear):
        module, name = module.rest, "rest."
    if isinstance(module, RotatedLinear):
        rotation = module.rotation()
        module, name = module.rounded, f"{name}rounded."
    return Rounded(module, name, rotation) if isinstance(module, RoundedLinear) else None


def beside(module: nn.Module) -> Tensor | None:
    """The product (out, in) of the factors beside the rounded matrix of a module, float64; None if there are none."""
    if not isinstance(module, SumLinear) or not isinstance(module.kept, LowRankLinear):
        return None
    return module.kept.left.weight.double() @ module.kept.right.weight.double()


def form_of(module: RoundedLinear) -> Form:
    """The form of a stored matrix. A grid without zero points is full if a scale is negative or the lowest code occurs, which a
    symmetric grid does not have."""
    if module.zeros:
        return Form(module.bits, "asymmetric", module.group)
    lowest = -(2 ** (module.bits - 1))
    full = bool((module.scales()[0] < 0).any() or (module.integers() == lowest).any())
    return Form(module.bits, "full" if full else "symmetric", module.group)


def round_again(rounded: Rounded, target: Tensor, gram: Tensor, outputs: Tensor | None, name: str) -> None:
    """Set the codes of a matrix to those that rounding with error feedback gives for a target (out, in), inputs with the second
    moment `gram` (in, in) and gradients of the outputs with the second moment `outputs` (out, out); None for outputs of equal
    weight. All are float64; `name` is for the log."""
    module, _, rotation = rounded
    form, (scales, zeros) = form_of(module), module.scales()
    points = torch.zeros_like(scales) if zeros is None else zeros + form.offset
    made = [(scales, points)]
    metric = metric_for(rotation.columns(gram), rotation.rows(outputs))
    (codes,) = codes_of(rotation.matrix(target), [form], made, metric, SWEEPS, name)
    module.steps.copy_(packed(codes - form.offset, form.bits))
