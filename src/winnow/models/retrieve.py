"""Retrieval of models from a directory or the hub, and a full check of their files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from winnow.errors import InputError, first_line
from winnow.io.artifacts import file_digest
from winnow.io.records import ModelManifest, TensorRecord
from winnow.io.tensors import TensorFile
from winnow.models.architectures import ARCHITECTURES, matrices_of
from winnow.models.classes import empty_model, is_causal
from winnow.models.config_json import check_source
from winnow.models.files import BYTES, FROM_GGUF, WANTED, model_files, tensor_bytes, weight_files
from winnow.models.naming import stored_tensors

CHUNK = 1 << 22  # numbers that are checked at a time
log = logging.getLogger(__name__)


def fetch(source: str, revision: str | None, cache: Path | None = None) -> Path:
    """The directory of a model: `source` itself, or the hub snapshot of `revision` (downloaded unless it is cached).

    `cache` is the hub's cache folder (default: that of HF_HOME or HF_HUB_CACHE).
    """
    if revision is None:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, cache_dir=cache, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise InputError(
            f"{source}@{revision[:8]}: not in the local hub cache, and cannot be downloaded ({first_line(error)}); "
            "run `snakemake prefetch` with a network connection"
        ) from error


def model_digests(directory: Path) -> dict[str, str]:
    """{name: digest} of the files of a model that a result can depend on. Raises InputError for a directory that is not a model,
    for an unsupported config.json, and for a compressed checkpoint."""
    return {path.name: file_digest(path) for path in _checked(directory)}


def _checked(directory: Path) -> list[Path]:
    files = model_files(directory)
    check_source(directory)
    return files


def describe(directory: Path) -> ModelManifest:
    """Description of a model directory: family, digests of files, and every tensor under its canonical name.

    Canonical names are those of the transformers model, not of the files. Raises InputError with the name of a tensor that is
    missing, unexpected, of another shape than the config says, or not finite, and the errors of `model_digests`.
    """
    files = _checked(directory)
    model = empty_model(directory)
    config = model.config
    tied = {t: s for t, s in model.all_tied_weights_keys.items() if t in model.state_dict()}
    places = stored_tensors(model, weight_files(directory))
    opened = {file: TensorFile(file) for file in {place.file for place in places.values()}}
    tensors: dict[str, TensorRecord] = {}
    for name, place in places.items():
        if place.dtype not in BYTES:
            raise InputError(f"{place.file}: {place.key} is stored as {place.dtype}; winnow reads {', '.join(BYTES)}")
        tensor = opened[place.file].read(place.key)
        if count := sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(CHUNK)):
            raise InputError(f"{place.file}: {place.key} has {count} values that are not finite; the weights are damaged")
        tensors[name] = {"file": place.file.name, "key": place.key, "dtype": place.dtype, "shape": place.shape}
    for target, source in tied.items():
        if target in tensors:  # stored twice in the file, once in the model
            if not torch.equal(*(opened[places[name].file].read(places[name].key) for name in (target, source))):
                raise InputError(
                    f"{directory}: the config ties {target} to {source}, but the file has two different tensors; "
                    "set tie_word_embeddings to false in config.json, or remove one of them"
                )
            del tensors[target]
    matrices_of(config.model_type, tensors)  # refuses an unknown family before any work
    described: ModelManifest = {
        "directory": str(directory),
        "model_type": config.model_type,
        "class": type(model).__name__,
        "causal": is_causal(config),
        "max_length": _longest(config),
        "files": {path.name: file_digest(path) for path in files},
        "tied": tied,
        "tensors": dict(sorted(tensors.items())),
        "bytes": sum(tensor_bytes(t) for t in tensors.values()),
    }
    if (made := directory / FROM_GGUF).is_file():
        described["dequantized"] = json.loads(made.read_text(encoding="utf-8"))
    return described


def _longest(config: Any) -> int | None:
    """The number of positions of the model; None if it has no limit."""
    rows = getattr(config.get_text_config(), "max_position_embeddings", None)
    return rows and rows - ARCHITECTURES[config.model_type].positions
