"""Retrieval: where a model comes from, and a full check of what its files hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from winnow.architectures import ARCHITECTURES, matrices_of
from winnow.classes import empty_model, is_causal
from winnow.errors import InputError, first_line
from winnow.io import file_digest
from winnow.models import BYTES, WANTED, model_files, tensor_bytes, weight_files
from winnow.naming import canonical_names
from winnow.tensor_files import TensorFile

CHUNK = 1 << 22  # numbers that are checked together
log = logging.getLogger(__name__)


def fetch(source: str, revision: str | None, cache: Path | None = None) -> Path:
    """The directory of a model: `source` itself, or the hub snapshot of `revision` (downloaded unless it is cached).

    `cache` is the hub's cache folder; by default the one that HF_HOME or HF_HUB_CACHE names.
    """
    if revision is None:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, cache_dir=cache, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise InputError(
            f"{source}@{revision[:8]}: neither in the local hub cache nor to be downloaded ({first_line(error)}); "
            "run `snakemake prefetch` where there is a network"
        ) from error


def describe(directory: Path) -> dict[str, Any]:
    """What a model directory holds: family, digests of files, and every tensor under its canonical name.

    Canonical names are those of the transformers model, whatever prefix the file uses. Raises InputError if a tensor is
    missing, unexpected, of another shape than the config says, or not finite (with its name).
    """
    files = model_files(directory)
    model = empty_model(directory)
    config = model.config
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {t: s for t, s in model.all_tied_weights_keys.items() if t in expected}
    name_of = canonical_names(model)
    tensors: dict[str, dict[str, Any]] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="np") as stream:  # checks the header; `pt` maps all of the file
                file = TensorFile(path)
                for key in stream.keys():
                    name = name_of(key)
                    if name is None:
                        log.info("%s: %s is not used by %s", path.name, key, type(model).__name__)
                        continue
                    if name in tensors:
                        raise InputError(f"{path}: {key} and {tensors[name]['key']} are both {name}; remove one of them")
                    dtype = stream.get_slice(key).get_dtype()
                    if dtype not in BYTES:
                        raise InputError(f"{path}: {key} is stored as {dtype}; winnow reads {', '.join(BYTES)}")
                    shape = stream.get_slice(key).get_shape()
                    if shape != expected[name]:
                        raise InputError(f"{path}: {key} has shape {shape}, the config says {expected[name]}")
                    tensor = file.read(key)
                    if count := sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(CHUNK)):
                        raise InputError(f"{path}: {key} holds {count} values that are not finite; the weights are damaged")
                    tensors[name] = {"file": path.name, "key": key, "dtype": dtype, "shape": list(tensor.shape)}
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from error
    for target, source in tied.items():
        if target in tensors and source in tensors:
            if not torch.equal(*(_stored(directory, tensors[name]) for name in (target, source))):
                raise InputError(
                    f"{directory}: the config ties {target} to {source}, but the file holds two different tensors; "
                    "set tie_word_embeddings to false in config.json, or remove one of them"
                )
            del tensors[target]  # stored twice in the file, once in the model
    missing = sorted(set(expected) - set(tensors) - set(tied))
    if missing:
        raise InputError(f"{directory}: {missing[0]} is missing from the weights ({len(missing)} tensors are)")
    matrices_of(config.model_type, tensors)  # an unknown family is refused here, before any work
    return {
        "directory": str(directory),
        "model_type": config.model_type,
        "class": type(model).__name__,
        "causal": is_causal(config),
        "max_length": _longest(config),
        "files": {p.name: file_digest(p) for p in files},
        "tied": tied,
        "tensors": dict(sorted(tensors.items())),
        "bytes": sum(tensor_bytes(t) for t in tensors.values()),
    }


def _longest(config: Any) -> int | None:
    """How many tokens the model has positions for."""
    rows = getattr(config.get_text_config(), "max_position_embeddings", None)
    return rows and rows - ARCHITECTURES[config.model_type].positions


def _stored(directory: Path, record: dict[str, Any]) -> torch.Tensor:
    return TensorFile(directory / record["file"]).read(record["key"])
