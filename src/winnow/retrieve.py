"""Retrieval: where a model comes from, and a full check of what its files hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from winnow.errors import InputError
from winnow.io import file_digest
from winnow.models import WANTED, model_files, tensor_bytes
from winnow.naming import canonical_names

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
            f"{source}@{revision[:8]}: neither in the local hub cache nor to be downloaded ({type(error).__name__}); "
            "run `snakemake prefetch` where there is a network"
        ) from error


def describe(directory: Path) -> dict[str, Any]:
    """What a model directory holds: family, digests of files, and every tensor under its canonical name.

    Canonical names are those of the transformers model, whatever prefix the file uses. Raises InputError if a tensor is
    missing, unexpected, of another shape than the config says, or not finite (with its name).
    """
    files = model_files(directory)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {t: s for t, s in model.all_tied_weights_keys.items() if t in expected}
    name_of = canonical_names(model)
    tensors: dict[str, dict[str, Any]] = {}
    for path in (p for p in files if p.suffix == ".safetensors"):
        try:
            with safe_open(path, framework="pt") as stream:
                for key in stream.keys():
                    name = name_of(key)
                    if name is None:
                        log.info("%s: %s is not used by %s", path.name, key, type(model).__name__)
                        continue
                    tensor = stream.get_tensor(key)
                    if list(tensor.shape) != expected[name]:
                        raise InputError(f"{path}: {key} has shape {list(tensor.shape)}, the config says {expected[name]}")
                    if not torch.isfinite(tensor).all():
                        count = int((~torch.isfinite(tensor)).sum())
                        raise InputError(f"{path}: {key} holds {count} values that are not finite; the weights are damaged")
                    dtype = stream.get_slice(key).get_dtype()
                    tensors[name] = {"file": path.name, "key": key, "dtype": dtype, "shape": list(tensor.shape)}
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error})") from error
    for target in [t for t, s in tied.items() if t in tensors and s in tensors]:
        del tensors[target]  # stored twice in the file, once in the model
    missing = sorted(set(expected) - set(tensors) - set(tied))
    if missing:
        raise InputError(f"{directory}: {missing[0]} is missing from the weights ({len(missing)} tensors are)")
    return {
        "directory": str(directory),
        "model_type": config.model_type,
        "max_length": getattr(config, "max_position_embeddings", None),
        "files": {p.name: file_digest(p) for p in files},
        "tied": tied,
        "tensors": dict(sorted(tensors.items())),
        "bytes": sum(tensor_bytes(t) for t in tensors.values()),
    }
