"""Rounded matrices in bfloat16 on CPUs, of which an engine keeps only the integers that PyTorch's 4-bit kernel reads.

Integers of up to 4 bits are one matrix of 4-bit numbers; those of 5 to 8 bits are two, n = 16 high + low, as in
`winnow.numerics.kernels`. An engine compiles its models and computes in inference mode, neither of which is for the modules of a
checkpoint; here the product is an operator, which compiled code calls as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from winnow.numerics.modules import RoundedLinear

PACK: Any = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
PRODUCT: Any = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
GROUPS = (32, 64, 128, 256)  # that the kernel has
BLOCK = 64  # rows that are packed together
MANY = 256  # tokens from which multiplying the matrix out is faster than the kernel


class FewBits(nn.Module):
    """A `RoundedLinear` with its integers in the layout of the kernel: 0.5 bytes per number of up to 4 bits, otherwise 1."""

    def __init__(self, module: RoundedLinear):
        """The module's own integers are not kept. It must be of a group in `GROUPS`."""
        super().__init__()
        self.in_features, self.out_features, self.group = module.in_features, module.out_features, module.group
        self.bias, self.added = module.bias, module.added
        codes, scale, zeros = module.parts()
        rows, columns = -module.out_features % BLOCK, -module.in_features % module.group  # missing in the last block and group
        codes = functional.pad(codes, (0, columns, 0, rows))
        scale = functional.pad(scale, (0, 0, 0, rows))
        offset = torch.zeros_like(scale) if zeros is None else -functional.pad(zeros, (0, 0, 0, rows)) * scale
        if module.bits <= 4:
            planes = [(codes + 8, scale, offset)]
        else:  # n + 128 = 16 (high + 8) + low; the kernel subtracts 8 from every number
            high, low = (codes + 128).div(16, rounding_mode="floor"), (codes + 128) % 16
            planes = [(high, 16 * scale, offset), (low, scale, 8 * scale)]
        self.count = len(planes)
        for number, (numbers, s, o) in enumerate(planes):
            packed = PACK(numbers.int().contiguous(), 2)
            self.register_buffer(f"numbers{number}", packed)
            self.register_buffer(f"scales{number}", torch.stack([s.T, o.T], dim=2).to(torch.bfloat16).contiguous())
            self.unpackable = torch.equal(codes_of(packed), numbers.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        planes = [getattr(self, f"{name}{number}") for number in range(self.count) for name in ("numbers", "scales")]
        y = torch.ops.winnow.few_bits(x, planes, self.group, self.out_features, self.unpackable)
        y = y if self.bias is None else y + self.bias
        return y if self.added is None else y + self.added(x)


def suits(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `FewBits` can replace a module on a CPU that computes in `dtype`."""
    known = isinstance(module, RoundedLinear) and module.group in GROUPS and PRODUCT is not None
    return known and dtype == torch.bfloat16


def codes_of(packed: Tensor) -> Tensor:
    """(m, n) uint8 from the layout that the kernel has with AVX-512: of 64 rows, the first 32 in the lower bits."""
    block = packed.view(-1, packed.shape[1] * 2, BLOCK // 2)  # per block and column one byte for every pair of rows
    return torch.cat([block & 15, block >> 4], dim=2).transpose(1, 2).flatten(0, 1)


def few_bits(x: Tensor, planes: list[Tensor], group: int, outputs: int, unpackable: bool) -> Tensor:
    """(tokens, outputs) of x (tokens, in) in bfloat16; `planes`: packed integers, and scales with offsets, of every plane.

    With many tokens the matrix is multiplied out, if the layout is known."""
    padded = functional.pad(x, (0, -x.shape[-1] % group)).contiguous()
    pairs = list(zip(planes[::2], planes[1::2], strict=True))
    if unpackable and len(x) >= MANY:
        matrix = _plane(*pairs[0], group)
        for pair in pairs[1:]:
            matrix += _plane(*pair, group)
        return functional.linear(padded, matrix.to(x.dtype))[:, :outputs].contiguous()
    first, *others = (PRODUCT(padded, numbers, group, scales) for numbers, scales in pairs)
    for other in others:
        first = first + other
    return first[:, :outputs].contiguous()


def _plane(numbers: Tensor, scales: Tensor, group: int) -> Tensor:
    """(m, n) float32: a plane, multiplied out."""
    codes = codes_of(numbers).float().sub_(8).unflatten(1, (-1, group))
    scale, offset = scales.float().permute(2, 1, 0)[..., None]
    return codes.mul_(scale).add_(offset).flatten(1)


def _shape(x: Tensor, planes: list[Tensor], group: int, outputs: int, unpackable: bool) -> Tensor:
    return x.new_empty((x.shape[0], outputs))


LIBRARY = torch.library.Library("winnow", "FRAGMENT")
LIBRARY.define("few_bits(Tensor x, Tensor[] planes, int group, int outputs, bool unpackable) -> Tensor")
LIBRARY.impl("few_bits", few_bits, "CPU")
torch.library.register_fake("winnow::few_bits", _shape, lib=LIBRARY)
