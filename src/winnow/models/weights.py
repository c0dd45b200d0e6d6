"""Writes weight files, and copies the files beside them (tokenizer, generation defaults), for every model that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from winnow.io.artifacts import atomic
from winnow.io.local_paths import CONFIGS, copy_config
from winnow.io.tensors import Spool
from winnow.models.files import TOKENIZER

SHARD_BYTES = 4 << 30
COPIED = ("generation_config.json", *TOKENIZER)


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> int:
    """Write tensors in their order to `model.safetensors`, or to shards of at most `limit` bytes with an index; only one tensor
    is in memory at a time. Returns the bytes of all tensors."""
    shards: list[list[str]] = []
    spool = Spool(directory / ".spool")
    total = 0

    def flush() -> None:
        shards.append(list(spool.records))
        with atomic(directory / f"model-{len(shards):05d}.safetensors") as partial:
            spool.finish(partial, {"format": "pt"})

    for name, tensor in tensors:
        if spool.records and spool.bytes + tensor.nbytes > limit:
            flush()
        spool.add(name, tensor)
        total += tensor.nbytes
    flush()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    for i, name in enumerate(names):
        (directory / f"model-{i + 1:05d}.safetensors").rename(directory / name)
    return total


def copy_files(names: Iterable[str], source: Path, directory: Path) -> None:
    """Copy those of `names` (tokenizer, generation defaults) that `source` has, without local paths."""
    for name in (name for name in names if any(fnmatch(name, pattern) for pattern in COPIED)):
        copy = copy_config if fnmatch(name, CONFIGS) else shutil.copyfile
        copy(source / name, directory / name)
