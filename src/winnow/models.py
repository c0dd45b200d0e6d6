"""Models on disk: where they come from, what their files hold, and strict loading."""

from __future__ import annotations

import logging
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.architectures import Matrix, matrices_of
from winnow.errors import InputError
from winnow.io import read_json
from winnow.provenance import file_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*")
WANTED = [*WEIGHTS, *TOKENIZER]


def model_files(directory: Path | str) -> list[Path]:
    """The files of a model directory that a result can depend on. Raises InputError if it holds no usable weights."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such model directory; check `source`, or give a `revision` for a hub id")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; a model directory in Hugging Face layout is needed")
    if not list(directory.glob("*.safetensors")):
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(directory.glob(pattern))]
        seen = f" ({', '.join(pickles)} is a pickle file, which can run code and is refused)" if pickles else ""
        raise InputError(f"{directory}: no *.safetensors{seen}; convert the weights with save_pretrained")
    return sorted({p for pattern in WANTED for p in directory.glob(pattern)})


def fetch(source: str, revision: str | None) -> Path:
    """The directory of a model: `source` itself, or the hub snapshot of `revision` (downloaded unless it is cached)."""
    if revision is None:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
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
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    files = model_files(directory)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {t: s for t, s in model.all_tied_weights_keys.items() if t in expected}
    tensors: dict[str, dict[str, Any]] = {}
    for path in (p for p in files if p.suffix == ".safetensors"):
        try:
            with safe_open(path, framework="pt") as stream:
                for key in stream.keys():
                    name = _canonical(key, expected, model)
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


def _canonical(key: str, expected: dict[str, Any], model: PreTrainedModel) -> str | None:
    """The model's name of a tensor of the file; None for those that the model class declares as ignored."""
    prefix = model.base_model_prefix + "."
    for name in (key, prefix + key, key.removeprefix(prefix)):
        if name in expected:
            return name
    ignored = model._keys_to_ignore_on_load_unexpected or []
    if any(re.search(pattern, key) for pattern in ignored) or key.endswith(("rotary_emb.inv_freq", ".masked_bias")):
        return None
    raise InputError(f"{key}: {type(model).__name__} has no such tensor")


def tensor_bytes(record: dict[str, Any]) -> int:
    """Bytes of a tensor as it is stored."""
    return math.prod(record["shape"]) * BYTES[record["dtype"]]


class ModelFiles:
    """A retrieved model: its manifest, and its tensors read one at a time; a file is verified before its first use."""

    def __init__(self, manifest: Path | str):
        self.manifest = read_json(manifest)
        self.directory = Path(self.manifest["directory"])
        self.tensors: dict[str, dict[str, Any]] = self.manifest["tensors"]
        self.matrices: list[Matrix] = matrices_of(self.manifest["model_type"], self.tensors)
        self._verified = cache(self._verify)

    def _verify(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file() or file_digest(path) != self.manifest["files"][name]:
            raise InputError(f"{path}: changed since the model was retrieved; run snakemake --forcerun retrieve_model")
        return path

    def verify(self) -> Path:
        """Check every file of the model; returns its directory."""
        for name in self.manifest["files"]:
            self._verified(name)
        return self.directory

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its canonical name, as stored."""
        from safetensors import safe_open

        record = self.tensors[name]
        with safe_open(self._verified(record["file"]), framework="pt") as stream:
            return stream.get_tensor(record["key"])

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """W (out, in) of a matrix in float64."""
        weight = self.tensor(f"{matrix.module}.weight").double()
        return weight.T.contiguous() if matrix.transposed else weight

    def dense_bytes(self, matrices: list[Matrix]) -> int:
        """Stored bytes of the matrices' modules, biases included."""
        names = {f"{m.module}.{part}" for m in matrices for part in ("weight", "bias")}
        return sum(tensor_bytes(self.tensors[name]) for name in sorted(names) if name in self.tensors)


def load_model(directory: Path | str, dtype: str, device: str) -> PreTrainedModel:
    """The causal language model of a directory, dense or compressed, with no random weight in it.

    Raises InputError if a tensor is missing, unexpected or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import winnow.hf  # noqa: F401 - registers the loader, and makes it part of the fingerprint

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
    )
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            raise InputError(f"{directory}: {problem.replace('_', ' ')}: {sorted(report[problem])[0]}")
    return model.to(device).eval()


def load_tokenizer(directory: Path | str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)
