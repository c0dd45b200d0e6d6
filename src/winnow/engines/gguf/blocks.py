"""The types of tensors in a GGUF file that an export uses: floating point, and integers in blocks of 32 inputs of a row, each
block with a float16 scale.

A matrix of the structure `rounded` is (code - zero point) * scale, with float16 scales for groups of inputs of a row. If its
groups consist of whole blocks, and its codes less their zero points are integers of one of the block types, the file holds the
same numbers: only the number of bits of a code differs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor
from torch.nn import functional

from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import multiplied

SIZE = 32  # inputs of a block
RANGES = {Type.Q4_0: (-8, 7), Type.Q5_0: (-16, 15), Type.Q8_0: (-128, 127)}  # integers of a block, the fewest bits first
Q8_0 = "q8_0"
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


class Data(NamedTuple):
    """A tensor as it is written: its numbers (float32 or float16), or the bytes of its rows (uint8)."""

    type: Type
    array: np.ndarray


class Grid(NamedTuple):
    """A matrix in blocks: signed integers (out, in) with `in` a multiple of 32, and scales (out, in / 32), both in float32."""

    codes: Tensor
    scales: Tensor

    def type(self) -> Type | None:
        """The block type of the fewest bits that has all integers; None if there is none, or if they are no integers, as with
        zero points that are real numbers."""
        if not torch.equal(self.codes, self.codes.round()):
            return None
        lowest, highest = (int(found) for found in self.codes.aminmax())
        return next((kind for kind, (low, high) in RANGES.items() if low <= lowest and highest <= high), None)

    def data(self) -> Data:
        """The bytes of its blocks. Raises ValueError if its integers fit no block type."""
        kind = self.type()
        if kind is None:
            raise ValueError("the integers take more than 8 bits")
        rows = len(self.codes)
        codes = self.codes.to(torch.int16).reshape(rows, -1, SIZE).numpy()
        parts: list[np.ndarray] = [self.scales.half().numpy()[..., None].view(np.uint8)]
        if kind == Type.Q8_0:
            parts.append(codes.astype(np.int8).view(np.uint8))
        else:
            steps = (codes - RANGES[kind][0]).astype(np.uint8)
            if kind == Type.Q5_0:
                parts.append(np.packbits(steps >> 4, axis=-1, bitorder="little"))  # the highest bits of all integers
            parts.append((steps[..., : SIZE // 2] & 15) | ((steps[..., SIZE // 2 :] & 15) << 4))
        return Data(kind, np.concatenate(parts, axis=-1).reshape(rows, -1))


def grid_of(module: RoundedLinear) -> Grid | None:
    """A rounded matrix in blocks, its last block filled up with zeros; None if a block has inputs of several groups, or if the
    integers fit no block type."""
    codes, scales, zeros = module.parts()
    if scales.shape[1] > 1 and module.group % SIZE:
        return None
    if zeros is not None:
        codes = multiplied(codes, torch.ones_like(scales), module.group, zeros)
    codes = functional.pad(codes, (0, -codes.shape[1] % SIZE))
    grid = Grid(codes, scales.repeat_interleave(-(-module.group // SIZE), 1)[:, : codes.shape[1] // SIZE])
    return grid if grid.type() is not None else None


def in_floats(tensor: Tensor, dtype: torch.dtype) -> Data:
    """The tensor in a floating-point dtype, rounded to nearest."""
    cast = tensor.to(dtype).contiguous()
    if dtype == torch.bfloat16:  # numpy has no such dtype
        return Data(Type.BF16, cast.view(torch.uint8).numpy())
    return Data(FLOATS[dtype], cast.numpy())


def in_q8_0(tensor: Tensor) -> tuple[Data, Tensor]:
    """(a matrix (m, n) rounded to 8 bits as llama.cpp rounds, its numbers in float32). Raises ValueError unless 32 divides n."""
    if tensor.shape[-1] % SIZE:
        raise ValueError(f"its rows have {tensor.shape[-1]} numbers, which is no multiple of {SIZE}; choose another type")
    array = quantize(tensor.float().numpy(), Type.Q8_0)
    return Data(Type.Q8_0, array), torch.from_numpy(dequantize(array, Type.Q8_0))
