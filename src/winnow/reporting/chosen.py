"""What an allocation chose: the structure and the size of every matrix, by layer and role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from winnow.io.tensors import BYTES
from winnow.models.architectures import matrices_of


def dense_bits(models: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{model: bits of a stored number of its compressible matrices}, the mean if they differ, from the manifests of models."""
    found = {}
    for manifest in models:
        tensors = manifest["tensors"]
        shapes = [(m.shape[0] * m.shape[1], f"{m.module}.weight") for m in matrices_of(manifest["model_type"], tensors)]
        total = sum(count * BYTES[tensors[name]["dtype"]] for count, name in shapes)
        label = manifest["provenance"]["wildcards"]["model"]
        found[label.rpartition("-")[0]] = 8 * total / sum(count for count, _ in shapes)
    return found
