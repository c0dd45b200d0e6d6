"""Reads statistics of matrices by layer, from a bundle of files or from memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from winnow.models.architectures import Matrix, moments_file


class Layers(Protocol):
    """A source of a layer's tensors by file name: a bundle, or statistics in memory."""

    def tensors(self, name: str) -> dict[str, Tensor]: ...


class Held:
    """Tensors in memory, with the interface of a bundle of files."""

    def __init__(self, files: Mapping[str, dict[str, Tensor]]):
        self.files = files

    def tensors(self, name: str) -> dict[str, Tensor]:
        return self.files[name]


class Latest:
    """Another source, of which the layer that was read last is kept for the next that asks for it."""

    def __init__(self, source: Layers):
        self.source = source
        self.kept: tuple[str, dict[str, Tensor]] | None = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        if self.kept is None or self.kept[0] != name:
            self.kept = None  # freed before the next is read
            self.kept = name, self.source.tensors(name)
        return self.kept[1]


class Statistics:
    """Statistics of a bundle; a layer is read once for all consecutive groups that need it."""

    def __init__(self, bundle: Layers | None, device: str):
        self.bundle, self.device = bundle, device
        self.precision = torch.finfo(torch.float64).eps
        self.layers: dict[int, dict[str, Tensor]] = {}

    def keep(self, group: list[Matrix]) -> None:
        """Free the layers that are not in the group."""
        layers = {m.layer for m in group}
        self.layers = {layer: tensors for layer, tensors in self.layers.items() if layer in layers}

    def of(self, matrix: Matrix, prefix: str, needs: list[str]) -> dict[str, Tensor]:
        """{need: float64 tensor} from the tensors `prefix.need` of the matrix's layer."""
        if not needs:
            return {}
        assert self.bundle is not None
        if matrix.layer not in self.layers:
            self.layers[matrix.layer] = self.bundle.tensors(moments_file(matrix.layer))
        found = {need: self.layers[matrix.layer][f"{prefix}.{need}"] for need in needs}
        rounded = [torch.finfo(value.dtype).eps for value in found.values() if value.is_floating_point()]  # a count is exact
        self.precision = max([self.precision, *rounded])
        return {need: value.to(self.device).double() for need, value in found.items()}
