"""Products of a few tokens with rounded matrices by PyTorch's own 4-bit kernel, without multiplying the matrix out.

Integers of up to 4 bits are one matrix of 4-bit numbers; those of 5 to 8 bits are two, n = 16 high + low. The kernel reads half
a byte per number where a dense product in bfloat16 reads two bytes, on which the time of a product with few tokens is spent. It
sums in float32; scales are rounded to bfloat16, where multiplying out rounds every number of the matrix.

The kernel has a layout of its own, which PyTorch does not document and which depends on the processor. `layout` finds it by
packing known numbers, so that a module may keep its integers in that layout only (`RoundedLinear.release`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from winnow.numerics.modules import RoundedLinear

FEW = 64  # tokens up to which the kernel is used: with more, one product with the dense matrix costs less
GROUPS = (32, 64, 128, 256)  # that the kernel has
ROWS = 16  # of whose multiples the kernel has outputs
BLOCKS = (64, 32, 16)  # rows that versions of the kernel store together
PROBE = 32  # columns of the matrix that finds the layout
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
        and fits(module)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and (module.released or not module.steps.is_inference())  # of such tensors nothing tells whether they were changed
    )


def fits(module: RoundedLinear) -> bool:
    """Whether the kernel exists and has the groups and outputs of a module."""
    return PRODUCT is not None and module.group in GROUPS and module.out_features % ROWS == 0


@cache
def layout() -> int | None:
    """The number of rows that the kernel stores together; None if its layout is none that `unpacked` inverts."""
    return next((rows for rows in BLOCKS if order(rows) is not None), None)


@cache
def order(rows: int) -> Tensor | None:
    """The position at which each of `rows` rows lies in the kernel's layout, where those of one column follow each other, two
    in a byte, the lower half first. None if the layout is another."""

    def lies(index: Tensor) -> Tensor:
        """(columns, rows): where an index of less than 256 lies."""
        low, high = (halves(PACK(part.int().contiguous(), 2)) for part in (index & 15, index >> 4))
        return (low + 16 * high).view(PROBE, rows)

    row = lies(torch.arange(rows)[:, None].expand(rows, PROBE))
    column = lies(torch.arange(PROBE).expand(rows, PROBE))
    same = bool((row == row[0]).all() and (column == torch.arange(PROBE)[:, None]).all())
    return row[0].long().argsort() if same else None


def halves(bytes_: Tensor) -> Tensor:
    """The numbers of 4 bits of all bytes, the lower half first."""
    flat = bytes_.flatten()
    return torch.stack([flat & 15, flat >> 4], dim=1).flatten()


def unpacked(stored: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) uint8: the numbers of 4 bits that the kernel stores as the bytes `stored`. Only if `layout` is known."""
    flat, block = stored.flatten(), layout() or rows
    whole = rows - rows % block
    parts = []
    for first, last, together in ((0, whole, block), (whole, rows, rows - whole)):
        lies = order(together) if last > first else None
        if lies is not None:
            found = halves(flat[first * columns // 2 : last * columns // 2]).view(-1, columns, together)
            parts.append(found.transpose(1, 2)[:, lies].reshape(last - first, columns))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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

    def steps(self, first: int, last: int) -> Tensor:
        """(last - first, in) int8: the integers of some rows, of which the first is the first of a block."""
        columns = self.planes[0][1].shape[0] * self.group
        part = slice(first * columns // 2, last * columns // 2)
        found, *low = (unpacked(stored.flatten()[part], last - first, columns) for stored, _ in self.planes)
        found = (found << 4 | low[0]) - 128 if low else found - 8
        return found.view(torch.int8)[:, : columns - self.short]

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
    """What changes when the module's numbers are changed (not in `torch.inference_mode`) or replaced."""
    tensors = [module.steps, module.scale, *([module.zero] if module.zeros else [])]
    return tuple(number for t in tensors for number in (t.data_ptr(), 0 if t.is_inference() else t._version))
