"""Sizes of a model, from its config and the headers of its weight files alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.errors import InputError
from winnow.io.artifacts import read_json
from winnow.io.tensors import BYTES, read_header
from winnow.models.architectures import ARCHITECTURES, Matrix, matrices_of, outer_of, select
from winnow.models.config_json import check_source
from winnow.models.files import model_files, tensor_bytes, weight_files
from winnow.models.gguf import GgufModel, gguf_file

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
PRODUCT = 1 << 22  # numbers of sums of statistics that are added at a time


@dataclass(frozen=True)
class Shape:
    """What a forecast needs of a model: its matrices, all numbers and bytes, vocabulary, width and depth."""

    matrices: list[Matrix]  # of the blocks
    outer: list[Matrix]  # embeddings and head
    numbers: int
    bytes: int
    unit: int  # bytes of a stored number of a matrix
    vocabulary: int
    width: int
    layers: int

    def sites(self) -> dict[tuple[int, str], int]:
        """{distinct input: its width}"""
        return {(m.layer, m.site): m.shape[1] for m in self.matrices}

    def block(self) -> int:
        """Numbers of the largest layer's matrices."""
        layers: dict[int, int] = {}
        for m in self.matrices:
            layers[m.layer] = layers.get(m.layer, 0) + math.prod(m.shape)
        return max(layers.values())

    def layer_sums(self, unit: int) -> float:
        """Bytes of the sums of one layer's statistics in float64, and of the products that are being added."""
        layers: dict[int, int] = {}
        for (layer, site), width in self.sites().items():
            numbers = width**2 + (width * self.width if site.endswith("ffn_hidden") else 0)
            layers[layer] = layers.get(layer, 0) + numbers
        return 8 * max(layers.values()) + (8 + unit) * min(PRODUCT, max(width**2 for width in self.sites().values()))

    def dense_bytes(self, targets: list[str]) -> int:
        return sum(m.shape[0] * m.shape[1] for m in select([*self.matrices, *self.outer], targets)) * self.unit


def _canonical(source: Path) -> dict[str, Any]:
    """{name in the model of transformers: dtype and shape} of a directory, from headers."""
    from winnow.models.classes import empty_model
    from winnow.models.naming import stored_tensors

    places = stored_tensors(empty_model(source), weight_files(source))
    return {name: {"dtype": place.dtype, "shape": place.shape} for name, place in places.items()}


def _outer(family: str, tensors: dict[str, Any]) -> list[Matrix]:
    """The embeddings and the head; a head that has no tensor is that of the embeddings."""
    own, bare = ARCHITECTURES[family], ARCHITECTURES[family].embeddings.partition(".")[2]
    if bare and f"{bare}.weight" in tensors:  # files that leave the name of the base model out
        base = own.embeddings.partition(".")[0]
        tensors = {name if name.startswith(own.head) else f"{base}.{name}": tensor for name, tensor in tensors.items()}
    tied = {} if f"{own.head}.weight" in tensors else {f"{own.head}.weight": f"{own.embeddings}.weight"}
    return outer_of(family, tensors, tied)


def _config(source: Path) -> dict[str, Any]:
    return json.loads((source / "config.json").read_text(encoding="utf-8"))


def shape_of(source: Path, manifest: Path | None = None, dtype: str | None = None) -> Shape:
    """The shape of a model directory, from its config and the headers of its weight files (or from a manifest of
    `retrieve_model`); or of a GGUF file once it is dequantised to `dtype`. Raises InputError for a source that holds no usable
    weights or an unknown family, and for a config.json that is refused."""
    config: dict[str, Any]
    if manifest is not None and manifest.is_file():
        found = read_json(manifest)
        source, tensors, family = Path(found["directory"]), found["tensors"], found["model_type"]
        config = _config(source)
    elif file := gguf_file(source):
        model = GgufModel(file)
        tensors, config = model.records(dtype), model.config.to_dict()
        family = config["model_type"]
    else:
        files, tensors = model_files(source), {}
        check_source(source)
        for path in (p for p in files if p.suffix == ".safetensors"):
            tensors |= read_header(path)
        config = _config(source)
        family = config["model_type"]
    matrices = matrices_of(family, tensors)
    if not matrices:  # files of some families leave the name of the base model out
        matrices = matrices_of(family, {f"{base}.{name}": t for name, t in tensors.items() for base in ("transformer", "model")})
    if not any(m.site.endswith("ffn_hidden") for m in matrices):  # names of files that transformers changes, as of experts
        tensors = _canonical(source)
        matrices = matrices_of(family, tensors)
    if not matrices:
        raise InputError(f"{source}: no layer of a {family} model is in its weight files")
    record = next(t for name, t in tensors.items() if name.endswith(f"{matrices[0].module.partition('.')[2]}.weight"))
    return Shape(
        matrices,
        _outer(family, tensors),
        sum(math.prod(t["shape"]) for t in tensors.values()),
        sum(tensor_bytes(t) for t in tensors.values()),
        BYTES[record["dtype"]],
        int(config.get("vocab_size", 0)),
        next(m.shape[1] for m in matrices if m.site.endswith("ffn_input")),
        len({m.layer for m in matrices}),
    )
