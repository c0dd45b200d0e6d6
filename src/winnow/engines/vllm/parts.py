"""The compressed matrices of one layer of vLLM, which joins q, k and v, and gate and up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from winnow.errors import InputError
from winnow.numerics.modules import LowRankLinear

END = ".tensor"  # of names on their way to a layer: so that no rule of a model's loader for weights and biases applies to them


class Tensors:
    """The tensors of a model's compressed modules: each exists once, also if several modules share it."""

    def __init__(self) -> None:
        self._made: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by the tensor on `meta`, which is kept so that its number stays its own
        self._loaded: set[int] = set()
        self._shared: set[int] = set()  # tensors of several modules
        self._replaced: dict[int, tuple[nn.Module, nn.Module]] = {}  # by the module that was replaced

    def allocate(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Give the tensors of a module on `meta` memory on the default device; floating-point numbers are stored in `dtype`."""
        for inner in module.modules():
            for own in (inner._parameters, inner._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor.is_meta:
                        own[name] = self._of(tensor, dtype)  # type: ignore[assignment]

    def _of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if id(tensor) in self._made:
            self._shared.add(id(self._made[id(tensor)][1]))
        else:
            made = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=False)
            self._made[id(tensor)] = tensor, made
        return self._made[id(tensor)][1]

    def load(self, target: Tensor, stored: Tensor, name: str) -> None:
        """Copy a stored tensor. Raises InputError if it has another shape."""
        if target.shape != stored.shape:
            raise InputError(f"{name} has shape {list(stored.shape)} in the files, but {list(target.shape)} by the config")
        target.data.copy_(stored)
        self._loaded.add(id(target))

    def check(self, module: nn.Module, where: str) -> None:
        """Raise InputError if a tensor of the module was not in the files. Nothing can be allocated afterwards."""
        self._made.clear()
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.numel() and id(tensor) not in self._loaded:
                raise InputError(f"{where}.{name}: missing from the weights; the checkpoint is incomplete")

    def replaced(self, dense: nn.Linear, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
        """What `make` gives for a matrix, once for all modules that use it, whose own numbers are then dropped; the matrix itself
        if its numbers are also those of another module."""
        if id(dense.weight) in self._shared:
            return dense
        if id(dense) not in self._replaced:
            self._replaced[id(dense)] = dense, make(dense)
            dense.weight = nn.Parameter(dense.weight.new_empty(0), requires_grad=False)
        return self._replaced[id(dense)][1]


class Parts(nn.Module):
    """The matrices that vLLM joins in one layer: their outputs for the same input, concatenated."""

    def __init__(self, named: dict[str, nn.Module], tensors: Tensors):
        """`named`: the modules by their names in the checkpoint, in the order of their outputs."""
        super().__init__()
        self.names, self.tensors = list(named), tensors
        self.parts = nn.ModuleList(named.values())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors named `part.name.tensor` (see `Places`); vLLM calls this for the layer. Returns the names below it."""
        own = dict((*self.parts.named_parameters(remove_duplicate=False), *self.parts.named_buffers(remove_duplicate=False)))
        loaded = set()
        for name, stored in weights:
            part, _, inner = name.removesuffix(END).partition(".")
            full = f"{self.names[int(part)]}.{inner}"
            if f"{part}.{inner}" not in own:
                raise InputError(f"the files have a tensor {full}, which the checkpoint's config does not describe")
            self.tensors.load(own[f"{part}.{inner}"], stored, full)
            loaded.add(f"compressed.parts.{part}.{inner}")
        return loaded

    def finish(self, around: Callable[[str, nn.Module], nn.Module]) -> None:
        """After loading: check that nothing is missing, put `around(name, part)` in place of every part, and join parts."""
        for name, part in zip(self.names, self.parts, strict=True):
            self.tensors.check(part, name)
        self.parts = nn.ModuleList(joined([around(name, part) for name, part in zip(self.names, self.parts, strict=True)]))

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, sum of the outputs) of x (tokens, in)."""
        found = [part(x) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def joined(parts: list[nn.Module]) -> list[nn.Module]:
    """The same outputs from fewer products: neighbours that are dense, or that share their right factor, become one."""
    found: list[nn.Module] = []
    part: Any
    for part in parts:
        last: Any = found[-1] if found else None
        if type(part) is nn.Linear and type(last) is nn.Linear:
            found[-1] = _stacked(last, part)
        elif _plain(part) and _plain(last) and part.right is last.right:
            both = LowRankLinear(last.in_features, 1, 1, bias=False)
            both.right, both.left = last.right, _stacked(last.left, part.left)
            found[-1] = both
        else:
            found.append(part)
    return found


def _plain(part: Any) -> bool:
    """Whether it is two factors and nothing else."""
    return type(part) is LowRankLinear and part.added is None


def _stacked(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One matrix with the rows of both, and their biases."""
    with torch.device("meta"):
        both = nn.Linear(first.in_features, first.out_features + second.out_features, bias=False)
    both.weight = nn.Parameter(torch.cat([first.weight, second.weight]), requires_grad=False)
    if first.bias is not None or second.bias is not None:
        biases: list[Tensor] = [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in (first, second)]
        both.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return both


class Places:
    """Where the tensors of compressed modules go: names in the checkpoint to names in vLLM's model."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def add(self, layer: str, names: list[str]) -> None:
        """The modules `names` of the checkpoint are the parts of a layer of vLLM."""
        self._places |= {name: f"{layer}.{number}" for number, name in enumerate(names)}

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self._places]

    def rename_source_key(self, key: str) -> tuple[str, None]:
        """(new name, None); vLLM calls this for every tensor that it reads. Other names are returned unchanged."""
        end = len(key)
        while (end := key.rfind(".", 0, end)) > 0:
            if key[:end] in self._places:
                return f"{self._places[key[:end]]}{key[end:]}{END}", None
        return key, None
