"""Rounded matrices with rotated inputs and outputs: W = U^T Q V with rotations U and V of `winnow.numerics.hadamard`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from winnow.numerics.hadamard import packed_signs, rotatable, rotated, rotated_back, signs_of, unpacked_signs
from winnow.numerics.modules import CompressedLinear, RoundedLinear


@dataclass(frozen=True)
class Rotation:
    """V of the inputs and U of the outputs of a matrix by their signs, each +-1, (n,) and (m,); None: not rotated."""

    inputs: Tensor | None
    outputs: Tensor | None

    def matrix(self, weight: Tensor) -> Tensor:
        """U W V^T of W (m, n)."""
        weight = weight if self.inputs is None else rotated(weight, self.inputs)
        return weight if self.outputs is None else rotated(weight.mT, self.outputs).mT

    def back(self, weight: Tensor) -> Tensor:
        """U^T W V of W (m, n): the inverse of `matrix`."""
        weight = weight if self.inputs is None else rotated_back(weight, self.inputs)
        return weight if self.outputs is None else rotated_back(weight.mT, self.outputs).mT

    def columns(self, metric: Tensor) -> Tensor:
        """V C V^T of C (n, n), or of its diagonal (n,)."""
        return _both_sides(metric, self.inputs)

    def rows(self, metric: Tensor | None) -> Tensor | None:
        """U F U^T of F (m, m), or of its diagonal (m,); None for I."""
        return None if metric is None else _both_sides(metric, self.outputs)

    def stored(self) -> dict[str, Tensor]:
        """{name in a `RotatedLinear`: packed signs}"""
        return {name: packed_signs(signs) for name, signs in vars(self).items() if signs is not None}


def rotation_of(which: str, outputs: int, inputs: int, device: torch.device) -> Rotation:
    """The rotation `none`, `inputs` or `both` of a matrix (outputs, inputs), in float64."""
    sides = [signs_of(side, n).to(device) for side, n in (("inputs", inputs), ("outputs", outputs))]
    return Rotation(None if which == "none" else sides[0], sides[1] if which == "both" else None)


def _both_sides(metric: Tensor, signs: Tensor | None) -> Tensor:
    if signs is None or (metric.dim() == 1 and bool((metric == metric[0]).all())):  # a multiple of I stays as it is
        return metric
    half = rotated(metric if metric.dim() == 2 else metric.diag(), signs)
    return rotated(half.mT, signs)


class RotatedLinear(CompressedLinear):
    """y = U^T rounded(V x) + b: `inputs` and `outputs` are the signs of V and U, one bit each; without `outputs`, U is I.

    Both transforms are computed in float32, or in float64 if x is, and rounded once to the dtype of x."""

    inputs: Tensor
    outputs: Tensor

    def __init__(self, rounded: RoundedLinear, both: bool, bias: bool):
        """`rounded` has no bias. Raises ValueError for a number of channels that is not rotated."""
        super().__init__(rounded.in_features, rounded.out_features)
        self.rounded, self.both = rounded, both
        self.widths = {"inputs": self.in_features} | ({"outputs": self.out_features} if both else {})
        for name, width in self.widths.items():
            if not rotatable(width):
                raise ValueError(f"{width} {name} cannot be rotated")
            self.register_buffer(name, torch.empty(-(-width // 8), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.unpacked: dict[str, tuple[Tensor, int, Tensor]] = {}  # packed signs, their version, and the same unpacked

    def signs(self, name: str, dtype: torch.dtype) -> Tensor:
        """(width,) +-1 of `inputs` or `outputs`, which are unpacked once."""
        stored: Tensor = getattr(self, name)
        if torch.compiler.is_compiling() or stored.is_inference():  # of such tensors nothing tells whether they were changed
            return unpacked_signs(stored, self.widths[name], dtype)
        kept = self.unpacked.get(name)
        if kept is None or kept[0] is not stored or kept[1] != stored._version or kept[2].dtype != dtype:
            with torch.inference_mode(False):
                kept = stored, stored._version, unpacked_signs(stored, self.widths[name], dtype)
            self.unpacked[name] = kept
        return kept[2]

    def held(self) -> list[Tensor]:
        """The tensors that are read in place of the stored signs."""
        return [signs for _, _, signs in self.unpacked.values()]

    def rotation(self) -> Rotation:
        """In float32."""
        signs = [self.signs(name, torch.float32) for name in self.widths]
        return Rotation(signs[0], signs[1] if self.both else None)

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        y = self.rounded(rotated(x.to(exact), self.signs("inputs", exact)).to(x.dtype))
        if self.both:
            y = rotated_back(y.to(exact), self.signs("outputs", exact)).to(x.dtype)
        return y if self.bias is None else y + self.bias
