"""Models on disk: the files of a directory, and the tensors of a retrieved model, read one at a time."""

from __future__ import annotations

import json
import math
from functools import cache
from os.path import isdir  # unlike Path's, it accepts invalid names
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.errors import InputError
from winnow.io.artifacts import file_digest, read_json
from winnow.io.records import ModelManifest, Sizes, TensorRecord
from winnow.io.tensors import BYTES, TensorFile
from winnow.models.architectures import Matrix, matrices_of, outer_of

if TYPE_CHECKING:
    import torch

CONFIGS = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*")
FROM_GGUF = "gguf.json"  # of a directory that was made from a GGUF file: which, and of which type
DESCRIBING = (*CONFIGS, *TOKENIZER, FROM_GGUF)
WANTED = ["model*.safetensors", *DESCRIBING]  # of a hub repository


def model_files(directory: Path | str) -> list[Path]:
    """The files of a model directory that a result can depend on. Raises InputError if it has no usable weights."""
    directory = Path(directory)
    if not isdir(directory):
        raise InputError(f"{directory}: there is no such model directory; check `source`, or give a `revision` for a hub id")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; a model directory in Hugging Face layout is needed")
    weights = weight_files(directory)
    others = {p for pattern in DESCRIBING for p in directory.glob(pattern)}
    return sorted({*weights, *others})


def weight_files(directory: Path | str) -> list[Path]:
    """The safetensors files that transformers reads: `model.safetensors`, or those of its index. Raises InputError for other
    formats, for files outside the directory, and for adapters and distributed checkpoints, which transformers prefers."""
    directory = Path(directory)
    if (directory / "adapter_config.json").is_file():
        raise InputError(f"{directory}: contains an adapter (adapter_config.json); merge it into its model and save the result")
    if shards := sorted(directory.glob("shard-*-model-*-of-*.safetensors")):  # transformers prefers them
        raise InputError(
            f"{directory}: contains a distributed checkpoint ({shards[0].name}); save its model with save_pretrained"
        )
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(directory.glob(pattern))]
        seen = f" ({', '.join(pickles)} is a pickle file, which can run code and is refused)" if pickles else ""
        raise InputError(f"{directory}: no model.safetensors and no index{seen}; convert the weights with save_pretrained")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("its weight_map names no files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of weight files ({error})") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (directory / name).is_file():
            raise InputError(f"{index}: names {name!r}, which is not a safetensors file in this directory")
    return [directory / name for name in names]


def tensor_bytes(record: TensorRecord) -> int:
    """Bytes of a tensor as stored. Raises InputError for an unsupported dtype."""
    return math.prod(record["shape"]) * number_bytes(record["dtype"])


def number_bytes(dtype: str) -> int:
    """Bytes of a stored number. Raises InputError for an unsupported dtype."""
    if dtype not in BYTES:
        raise InputError(f"a tensor is stored as {dtype}; winnow reads {', '.join(BYTES)}")
    return BYTES[dtype]


class ModelFiles:
    """A retrieved model: its manifest, and its tensors read one at a time; a file is verified before its first use."""

    def __init__(self, manifest: Path | str | ModelManifest):
        """`manifest`: the path of a model.json, or its content."""
        self.manifest: ModelManifest = manifest if isinstance(manifest, dict) else read_json(manifest)
        self.directory = Path(self.manifest["directory"])
        self.tensors = self.manifest["tensors"]
        self.matrices: list[Matrix] = matrices_of(self.manifest["model_type"], self.tensors)  # of the blocks
        self.outer = outer_of(self.manifest["model_type"], self.tensors, self.manifest["tied"])  # embeddings and head
        self._verified = cache(self._verify)
        self._opened = cache(lambda name: TensorFile(self._verified(name)))

    def _verify(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file() or file_digest(path) != self.manifest["files"][name]:
            raise InputError(f"{path}: changed since the model was retrieved; run snakemake --forcerun retrieve_model")
        return path

    @property
    def every(self) -> list[Matrix]:
        """All matrices that a budget can target."""
        return [*self.matrices, *self.outer]

    def verify(self) -> Path:
        """Check every file of the model; returns its directory."""
        for name in self.manifest["files"]:
            self._verified(name)
        return self.directory

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its canonical name, as stored."""
        record = self.tensors[name]
        return self._opened(record["file"]).read(record["key"])

    def stored(self, matrix: Matrix) -> torch.Tensor:
        """W (out, in) of a matrix in its stored dtype."""
        weight = self.tensor(f"{matrix.module}.weight")
        return weight.T if matrix.transposed else weight

    def weight(self, matrix: Matrix, device: str = "cpu") -> torch.Tensor:
        """W (out, in) of a matrix in float64."""
        return self.stored(matrix).to(device).double().contiguous()

    def sizes(self) -> Sizes:
        """Bytes of the dense model."""
        block = self.dense_bytes(self.matrices)
        return {"dense_bytes": block, "stored_bytes": block, "model_stored_bytes": self.manifest["bytes"]}

    def dense_bytes(self, matrices: list[Matrix]) -> int:
        """Stored bytes of the matrices' modules, including biases."""
        names = {f"{m.module}.{part}" for m in matrices for part in ("weight", "bias")}
        return sum(tensor_bytes(self.tensors[name]) for name in sorted(names) if name in self.tensors)
