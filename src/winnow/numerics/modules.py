"""The modules of a compressed checkpoint."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from winnow.numerics.kernels import BLOCKS, Planes, applies, fits, layout, versions
from winnow.numerics.rounding import multiplied, packed, packed_width, unpacked


def has_bias(dense: nn.Module) -> bool:
    """Whether the module to be replaced has a bias."""
    return getattr(dense, "bias", None) is not None


def index_dtype(channels: int) -> torch.dtype:
    """int16 if it can number this many channels, otherwise int32."""
    return torch.int16 if channels < 2**15 else torch.int32


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """The channels (the last axis) of x in `order`. For several rows on a CPU `gather` is much faster than `index_select`."""
    if x.is_cpu and x.numel() > order.numel():
        return x.gather(-1, order.long().expand(x.shape))
    return x.index_select(-1, order.int())


AT_ONCE = 1 << 19  # numbers of a matrix multiplied out at a time on a CPU: they stay in its cache


class CompressedLinear(nn.Module):
    """A linear map from `in_features` to `out_features` that is not stored as a dense matrix.

    `weight` is an empty tensor of zero bytes. It makes plain transformers refuse the checkpoint with a size mismatch instead
    of initialising the layer with random numbers.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(0))
        self.added: LowRankLinear | None = None

    def add(self, right: Tensor, left: Tensor) -> None:
        """Add left right x to the output, with right (k, in) and left (out, k), stored in `added`."""
        if "added" not in self._modules:
            self.register_forward_hook(_with_added)
        if self.added is not None:
            right = torch.cat([self.added.right.weight, right])
            left = torch.cat([self.added.left.weight, left], dim=1)
        self.added = LowRankLinear(self.in_features, self.out_features, len(right), bias=False).to(left)
        self.added.right.weight, self.added.left.weight = nn.Parameter(right), nn.Parameter(left)

    def take_back(self, rank: int) -> None:
        """Undo the last `add`, which had this rank."""
        right, left = self.added.right.weight[:-rank], self.added.left.weight[:, :-rank]  # type: ignore[union-attr]
        self.added = None
        if len(right):
            self.add(right, left)


def _with_added(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y if module.added is None else y + module.added(args[0])  # type: ignore[operator]


class SharedLinear(nn.Linear):
    """A linear map that several modules apply to the same input: the first call computes the result, the others reuse it.

    The result is cached for the identical input tensor, while neither it nor the weight is modified, until `readers` modules
    have used it. Nothing is cached where modifications are not tracked (`torch.inference_mode`) or a graph is recorded;
    compiled code finds equal products by itself."""

    _kept: tuple[Tensor, Tensor, int, int, Tensor, int] | None  # input, weight, their versions, result, remaining readers

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.readers = 1
        self._kept = None

    def forward(self, x: Tensor) -> Tensor:
        weight, kept = self.weight, self._kept
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference() or weight.is_inference():
            return functional.linear(x, weight)
        version, own = x._version, weight._version
        if kept is not None and kept[0] is x and kept[1] is weight and kept[2] == version and kept[3] == own:
            y, left = kept[4], kept[5] - 1
        else:
            y, left = functional.linear(x, weight), self.readers - 1
        # One assignment, so that threads see all of it or nothing; via __dict__, as Module.__setattr__ takes microseconds.
        self.__dict__["_kept"] = (x, weight, version, own, y, left) if left else None
        return y


class LowRankLinear(CompressedLinear):
    """y = left (right x) + b, with right (k, in) and left (out, k), both `nn.Linear`; `shared` if other modules apply the same
    right factor to the same input."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, shared: bool = False):
        super().__init__(in_features, out_features)
        self.right = SharedLinear(in_features, rank) if shared else nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


class TwoSidedLinear(CompressedLinear):
    """y = left (core (input^T x)) + b: core (k, k), left (out, k), and input (in, k), stored as the columns of a basis so that
    it can be tied to the `left.weight` of another module."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__(in_features, out_features)
        self.input = nn.Parameter(torch.empty(in_features, rank))
        self.core = nn.Linear(rank, rank, bias=False)
        self.left = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.core(x @ self.input))


class ChainLinear(CompressedLinear):
    """y = left(right(x)), two modules; the bias is in `left`."""

    def __init__(self, right: CompressedLinear, left: CompressedLinear):
        super().__init__(right.in_features, left.out_features)
        self.right = right
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


class SumLinear(CompressedLinear):
    """y = kept(x) + rest(x); the bias is in `kept`."""

    def __init__(self, kept: CompressedLinear, rest: nn.Module):
        super().__init__(kept.in_features, kept.out_features)
        self.kept = kept
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x) + self.rest(x)


class RowsLinear(CompressedLinear):
    """y = [right x; left right x][order] + b: `right` (k, in) gives k outputs, `left` (out - k, k) the others from them."""

    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__(in_features, out_features)
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("order", torch.empty(out_features, dtype=index_dtype(out_features)))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.right(x)
        y = reordered(torch.cat([rows, self.left(rows)], dim=-1), self.order)
        return y if self.bias is None else y + self.bias


class ConcatLinear(CompressedLinear):
    """y = [part_1 x; part_2 x; ...] (+ b), its channels then permuted by `order` if there is one."""

    order: Tensor

    def __init__(self, parts: dict[str, nn.Module], ordered: int = 0, bias: int = 0):
        """`ordered`: number of outputs if they are permuted, else 0; `bias`: number of outputs if a bias is added, else 0."""
        maps: list[Any] = list(parts.values())
        inputs = next((part.in_features for part in maps if hasattr(part, "in_features")), bias)
        super().__init__(inputs, ordered or bias or sum(part.out_features for part in maps))
        self.names = list(parts)
        for name, part in parts.items():
            self.add_module(name, part)
        if ordered:
            self.register_buffer("order", torch.empty(ordered, dtype=index_dtype(ordered)))
        self.ordered = bool(ordered)
        self.bias = nn.Parameter(torch.empty(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self._modules[name](x) for name in self.names], dim=-1)  # type: ignore[misc]
        if self.ordered:
            y = reordered(y, self.order)
        return y if self.bias is None else y + self.bias


class SplitLinear(CompressedLinear):
    """y = part_1 x_1 + part_2 x_2 + ... + b, with x_i consecutive channels of x, or of x permuted by `order`."""

    order: Tensor

    def __init__(self, parts: dict[str, nn.Module], widths: list[int], ordered: bool = False, bias: int = 0):
        maps: list[Any] = list(parts.values())
        super().__init__(sum(widths), maps[0].out_features if maps else 0)
        self.names, self.widths, self.ordered = list(parts), widths, ordered
        for name, part in parts.items():
            self.add_module(name, part)
        if ordered:
            self.register_buffer("order", torch.empty(sum(widths), dtype=index_dtype(sum(widths))))
        self.bias = nn.Parameter(torch.empty(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.ordered:
            x = reordered(x, self.order)
        pieces = x.split(self.widths, dim=-1)
        y = self._modules[self.names[0]](pieces[0])  # type: ignore[misc]
        for name, piece in zip(self.names[1:], pieces[1:], strict=True):
            y = y + self._modules[name](piece)  # type: ignore[misc]
        return y if self.bias is None else y + self.bias


class RoundedLinear(CompressedLinear):
    """y = ((steps - zero) * scale) x + b: integers (out, in) of 8 bits, or packed ones of fewer bits, with one scale (and, with
    `zeros`, one zero point) for every `group` inputs of a row. The matrix is dequantised in every call, exactly in float32, and
    rounded once, to the dtype of x; except for a few tokens, where a kernel applies (`winnow.numerics.kernels`).

    Scales are float16, stored as their bits in int16: casting the model leaves integers unchanged, so that scales keep their
    measured values in every dtype and take two bytes in every saved model."""

    steps: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, group: int, bias: bool, zeros: bool = False):
        super().__init__(in_features, out_features)
        self.bits, self.group, self.zeros = bits, group, zeros
        dtype, groups = torch.int8 if bits == 8 else torch.uint8, -(-in_features // group)
        self.register_buffer("steps", torch.empty(out_features, packed_width(in_features, bits), dtype=dtype))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.int16))
        if zeros:
            self.register_buffer("zero", torch.empty(out_features, packed_width(groups, bits), dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.trained: nn.Module | None = None  # during training: gives the matrix from parameters, see `winnow.recovery.rounded`
        self.planes: Planes | None = None  # for the kernel, made when it is first used
        self.whole = True  # whether it is the dense matrix in its own order, not some neurons of it

    @property
    def released(self) -> bool:
        """Whether the integers are kept in the layout of the kernel only."""
        return self.planes is not None and not self.steps.numel()

    def release(self) -> bool:
        """Keep the integers in the layout of the kernel only, from which they are unpacked where they are needed, so that they
        take memory once. Returns whether that was possible: on a CPU, with groups and outputs that the kernel has."""
        if self.released:
            return True
        if self.scale.device.type != "cpu" or not fits(self) or layout() is None:
            return False
        planes = Planes(self)
        if not torch.equal(planes.steps(0, self.out_features), unpacked(self.steps, self.in_features, self.bits)):
            return False
        self.planes, self.steps = planes, self.steps.new_empty(0)
        planes.of = versions(self)
        return True

    def integers(self, first: int = 0, last: int | None = None) -> Tensor:
        """(last - first, in) int8: the steps of some rows, of which the first is a multiple of the kernel's blocks."""
        if self.released:
            return self.planes.steps(first, last or self.out_features)  # type: ignore[union-attr]
        return unpacked(self.steps[first:last], self.in_features, self.bits)

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """(scales (out, groups), zero points (out, groups) or None) in float32."""
        scale = self.scale.view(torch.float16).float()
        return scale, unpacked(self.zero, scale.shape[1], self.bits).float() if self.zeros else None

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(steps (out, in), scales (out, groups), zero points (out, groups) or None) in float32."""
        return self.integers().float(), *self.scales()

    def matrix(self) -> Tensor:
        """(out, in) float32."""
        if self.trained is not None:
            return self.trained()
        steps, scale, zeros = self.parts()
        return multiplied(steps, scale, self.group, zeros)

    def by_rows(self, x: Tensor) -> Tensor:
        """The output of `x`, of which as many channels are computed at a time as the matrix has rows that stay in the cache of
        a CPU. Elsewhere the whole matrix is multiplied out, and for gradients, whose parts would be summed in the dtype of x."""
        rows = max(1, AT_ONCE // (self.in_features * BLOCKS[0])) * BLOCKS[0]
        whole = self.trained is not None or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        if whole or not x.is_cpu or self.out_features <= rows:
            return functional.linear(x, self.matrix().to(x.dtype), self.bias)
        (scales, zeros), found = self.scales(), []
        for first in range(0, self.out_features, rows):
            part = slice(first, min(first + rows, self.out_features))
            steps, zero = self.integers(part.start, part.stop).float(), None if zeros is None else zeros[part]
            matrix = multiplied(steps, scales[part], self.group, zero).to(x.dtype)
            found.append(functional.linear(x, matrix, None if self.bias is None else self.bias[part]))
        return torch.cat(found, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        if self.trained is None and applies(self, x):
            if self.planes is None or self.planes.of != versions(self):
                self.planes = Planes(self)
            y = self.planes.product(x)
            return y if self.bias is None else y + self.bias
        return self.by_rows(x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.released:
            destination[f"{prefix}steps"] = packed(self.integers(), self.bits)


class RoundedEmbedding(RoundedLinear):
    """The rows of a rounded matrix (vocabulary, width), of which only those of the given tokens are dequantised: exactly in
    float32, and rounded once, to the dtype of the model. `factor`: what the outputs are multiplied by, as in Gemma."""

    def __init__(self, vocabulary: int, width: int, bits: int, group: int, zeros: bool = False, factor: float | None = None):
        super().__init__(width, vocabulary, bits, group, False, zeros)
        self.num_embeddings, self.embedding_dim, self.factor = vocabulary, width, factor
        _empty_parameter(self)

    def release(self) -> bool:
        return False  # no kernel looks rows up

    def product(self, x: Tensor) -> Tensor:
        """(..., vocabulary) of x (..., width): that of the matrix, for a head that is tied to it."""
        return super().forward(x)

    def forward(self, ids: Tensor) -> Tensor:
        own, dtype = ids.flatten(), cast(torch.dtype, self.weight.dtype)
        steps = unpacked(self.steps[own], self.in_features, self.bits).float()
        scale = self.scale[own].view(torch.float16).float()
        zeros = unpacked(self.zero[own], scale.shape[1], self.bits).float() if self.zeros else None
        rows = multiplied(steps, scale, self.group, zeros).to(dtype).unflatten(0, ids.shape)
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=dtype, device=rows.device)


class RoundedHead(CompressedLinear):
    """y = W x (+ b) with the matrix of rounded embeddings, the module in `tied_to`, which is not a part of this one."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features)
        self.tied_to: tuple[RoundedEmbedding, ...] = ()
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        _empty_parameter(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tied_to[0].product(x)
        return y if self.bias is None else y + self.bias


def _empty_parameter(module: CompressedLinear) -> None:
    """Make the empty `weight` a parameter, which is what transformers can tie."""
    del module.weight
    module.weight = nn.Parameter(torch.empty(0))


class Constant(nn.Module):
    """Outputs `width` channels of one value: 1 as the gate of channels that pass unchanged, 0 in place of a dropped part."""

    def __init__(self, width: int, value: float):
        super().__init__()
        self.out_features, self.value = width, value

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((1,), self.value).expand(*x.shape[:-1], self.out_features)


class PartialActivation(nn.Module):
    """The activation on the first `width` channels; the others pass unchanged."""

    def __init__(self, activation: nn.Module, width: int):
        super().__init__()
        self.activation = activation
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.activation(x[..., : self.width]), x[..., self.width :]], dim=-1)
