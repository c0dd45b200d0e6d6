"""Products of a few tokens with rounded matrices by PyTorch's own 4-bit kernel, without multiplying the matrix out.

Integers of up to 4 bits are one matrix of 4-bit numbers; those of 5 to 8 bits are two, n = 16 high + low. The kernel reads half
a byte per number where a dense product in bfloat16 reads two bytes, on which the time of a product with few tokens is spent. It
sums in float32; scales are rounded to bfloat16, where multiplying out rounds every number of the matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from winnow.numerics.modules import RoundedLinear

FEW = 16  # tokens up to which the kernel is used: with more, one product with the dense matrix costs less
GROUPS = (32, 64, 128, 256)  # that the kernel has
ROWS = 16  # of whose multiples the kernel has outputs
PACK: Any = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
PRODUCT: Any = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


def applies(module: RoundedLinear, x: Tensor) -> bool:
    """Whether the kernel computes this product: a few tokens in bfloat16 on a CPU, without gradients, not in
    compiled code, and groups that it has."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() <= FEW * module.in_features
        and module.group in GROUPS
        and module.out_features % ROWS == 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not module.steps.is_inference()  # of such tensors nothing tells whether they were changed
        and PRODUCT is not None
    )


class Planes:
    """The integers of a rounded matrix as one or two matrices of 4 bits in the layout of the kernel, with scales and offsets."""

    def __init__(self, module: RoundedLinear):
        self.of, self.group = versions(module), module.group
        steps, scale, zeros = module.parts()
        self.short = -module.in_features % module.group  # inputs that the last group lacks, and that are 0
        steps = functional.pad(steps, (0, self.short))
        offset = torch.zeros_like(scale) if zeros is None else -zeros * scale
        if module.bits <= 4:
            parts = [(steps + 8, scale, offset)]
        else:  # n + 128 = 16 (high + 8) + low; the kernel subtracts 8 from every number
            high, low = (steps + 128).div(16, rounding_mode="floor"), (steps + 128) % 16
            parts = [(high, 16 * scale, offset), (low, scale, 8 * scale)]
        self.planes = [
            (PACK(codes.int().contiguous(), 2), torch.stack([s.T, o.T], dim=2).to(torch.bfloat16).contiguous())
            for codes, s, o in parts
        ]

    def tensors(self) -> list[Tensor]:
        """What the kernel reads."""
        return [tensor for plane in self.planes for tensor in plane]

    def product(self, x: Tensor) -> Tensor:
        """(..., out) of x (..., in)."""
        flat = functional.pad(x, (0, self.short)).reshape(-1, x.shape[-1] + self.short).contiguous()
        first, *others = (PRODUCT(flat, packed, self.group, scales) for packed, scales in self.planes)
        for other in others:
            first = first + other
        return first.unflatten(0, x.shape[:-1])


def versions(module: RoundedLinear) -> tuple[int, ...]:
    """What changes when the module's numbers are changed or replaced."""
    tensors = [module.steps, module.scale, *([module.zero] if module.zeros else [])]
    return tuple(number for t in tensors for number in (t.data_ptr(), t._version))
