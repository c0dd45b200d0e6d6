"""The compressible matrices of a checkpoint as llama.cpp wants them: blocks with the numbers of the checkpoint where its matrix
is rounded, numbers otherwise; outputs in llama.cpp's order, and FFNs of the length that they are stored with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from winnow.checkpoint.export import Checkpoint, affine_of, rounded_matrix, widths_of
from winnow.engines.gguf.blocks import SIZE, Grid, grid_of
from winnow.engines.gguf.families import FAMILIES, padded_rows, row_order
from winnow.errors import InputError, first_line
from winnow.models.architectures import Matrix
from winnow.numerics.modules import RoundedLinear

INTO_FFN = ("gate_proj", "up_proj", "gate_up_proj")


class Stored(NamedTuple):
    """One matrix (out, in) of the file: in blocks, or as numbers that came from a module in `dtype`; and its bias (out,)."""

    matrix: Matrix
    content: Grid | Tensor
    bias: Tensor | None
    dtype: torch.dtype


class Matrices:
    """The matrices of a checkpoint. `in_blocks`: whether those that are not rounded will be stored in blocks too."""

    def __init__(self, checkpoint: Checkpoint, in_blocks: bool):
        """Raises InputError for a compressed module that is not a matrix."""
        self.checkpoint, self.in_blocks = checkpoint, in_blocks
        self.all = checkpoint.matrices()
        self.widths = widths_of(checkpoint, self.all)
        self.family = FAMILIES[checkpoint.dense.config.model_type]
        self.outer = checkpoint.outer()
        outer = {name for m in self.outer for name in (m.module, m.head)}
        for name in sorted(set(checkpoint.layouts) - set(self.widths) - outer):
            kind = checkpoint.layouts[name]["kind"]
            raise InputError(
                f"{checkpoint.directory}: {name}: {kind} replaces the FFN's activation, for which llama.cpp has no place; this "
                "checkpoint can only be loaded with winnow"
            )
        self.lengths = self._lengths()

    def _lengths(self) -> list[int]:
        """The length of every layer's FFN: its neurons, in whole blocks if the last matrix is stored in blocks; where llama.cpp
        has one length for all layers, the largest."""
        neurons, blocks = {}, {}
        for m in (m for m in self.all if m.role == "down_proj"):
            neurons[m.layer] = self.widths.get(m.module, m.shape)[1]
            blocks[m.layer] = self.in_blocks or "bits" in self.checkpoint.layouts.get(m.module, {})
        if self.family.varying is None:
            neurons = dict.fromkeys(neurons, max(neurons.values()))
            blocks = dict.fromkeys(blocks, any(blocks.values()))
        return [-(-neurons[layer] // SIZE) * SIZE if blocks[layer] else neurons[layer] for layer in sorted(neurons)]

    def __iter__(self) -> Iterator[Stored]:
        """Every matrix, one at a time. Raises InputError, naming the module, for what no matrix of llama.cpp computes."""
        for m in self.all:
            own = self._compressed(m) if m.module in self.widths else self._dense(m)
            yield self._in_place(own)

    def _dense(self, m: Matrix) -> Stored:
        weight = self.checkpoint.tensor(f"{m.module}.weight")
        bias = self.checkpoint.tensor(f"{m.module}.bias") if m.bias else None
        return Stored(m, weight.T if m.transposed else weight, bias, weight.dtype)

    def _compressed(self, m: Matrix) -> Stored:
        (outputs, inputs), (rows, columns) = self.widths[m.module], m.shape
        kind = self.checkpoint.layouts[m.module]["kind"]
        problem = f"{self.checkpoint.directory}: {m.module} ({kind}) cannot be exported to gguf: "
        if (outputs != rows and m.role not in INTO_FFN) or (inputs != columns and m.role != "down_proj"):
            raise InputError(f"{problem}it is {outputs} x {inputs}, the dense one {rows} x {columns}")
        if self.checkpoint.layouts[m.module].get("rotation"):
            raise InputError(f"{problem}its inputs are rotated, which llama.cpp does not do; use --format dense")
        module, dtype = self.checkpoint.module(m.module)
        if isinstance(module, RoundedLinear) and module.added is None:
            bias = self.checkpoint.tensor(f"{m.module}.bias") if m.bias else None
            whole = m.role == "down_proj" or inputs % SIZE == 0  # only an FFN can be filled up to whole blocks
            return Stored(m, (grid_of(module) if whole else None) or module.matrix(), bias, dtype)
        try:
            weight, offset = affine_of(module, outputs, inputs)
        except ValueError as error:
            raise InputError(problem + first_line(error)) from error
        has = m.bias or bool(offset.any())
        if has and not (m.bias or self.family.biases):
            raise InputError(f"{problem}it adds a bias, for which llama.cpp has no place in this family")
        return Stored(m, weight, offset if has else None, dtype)

    def rounded_outer(self) -> Iterator[Stored]:
        """The rounded embeddings and head."""
        for m in self.outer:
            module, dtype = self.checkpoint.module(m.module)
            rounded = cast(RoundedLinear, module)
            whole = m.shape[1] % SIZE == 0 and rounded.added is None
            yield Stored(m, (grid_of(rounded) if whole else None) or rounded_matrix(module), None, dtype)

    def _in_place(self, own: Stored) -> Stored:
        """With its outputs in llama.cpp's order, and zeros for neurons that are only there to fill the FFN's length."""
        m, content = own.matrix, own.content
        length, rows = self.lengths[m.layer], len(content.codes if isinstance(content, Grid) else content)
        order = row_order(self.checkpoint.dense.config, m.role, rows)
        if m.role in INTO_FFN:
            order = padded_rows(m.role, rows, length)
        if order is not None:
            content = Grid(*(_rows(part, order) for part in content)) if isinstance(content, Grid) else _rows(content, order)
            own = own._replace(bias=None if own.bias is None else _rows(own.bias, order))
        if m.role == "down_proj":
            content = _wider(content, length)
        return own._replace(content=content)


def _rows(tensor: Tensor, order: Tensor) -> Tensor:
    """The rows of a tensor in an order, in which -1 is a row of zeros."""
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])[order]


def _wider(content: Grid | Tensor, columns: int) -> Grid | Tensor:
    """With zeros at the end of every row, up to this many columns."""
    if isinstance(content, Grid):
        missing = columns - content.codes.shape[1]
        return Grid(functional.pad(content.codes, (0, missing)), functional.pad(content.scales, (0, missing // SIZE)))
    return functional.pad(content, (0, columns - content.shape[1]))
