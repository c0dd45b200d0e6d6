"""Models in GGUF files, the format of llama.cpp: read once, tensor by tensor, into a directory of safetensors.

Names and layouts of tensors, the config and the tokenizer are those that transformers maps them to; this module refuses what that
mapping would drop without a word: tensors without a place in the model, scaled positions, other attention scales.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from os.path import isdir, isfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError, first_line
from winnow.io.artifacts import file_digest
from winnow.io.tensors import NAMES
from winnow.models.architectures import ARCHITECTURES
from winnow.models.files import FROM_GGUF

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from winnow.io.records import Dequantized

log = logging.getLogger(__name__)
ENDING = ".gguf"
CURE = "use the original model in safetensors"
EXACT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # types of matrices that are not quantised
FAMILIES = {"gemma3": "gemma3_text"}  # the model_type of an architecture that has another name
# Entries of the metadata that the mapping of transformers leaves out or calls otherwise.
MISSED = {"gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"}}
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # pre-tokenizers of llama.cpp that split digits
# What reading a damaged file raises, in numpy and in the libraries.
DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, OSError, MemoryError, struct.error)
# Llama 3's scaling of positions, of which a file has the result (`rope_freqs`) and not the numbers.
SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0)


def gguf_file(source: Path | str) -> Path | None:
    """The GGUF file of a model's source: the file itself, or the only one in a directory without safetensors; None for any other
    source. Raises InputError for a directory with several, and for a part of a split model."""
    path = Path(source)
    if path.suffix.lower() != ENDING:
        if not isdir(path) or any(path.glob("*.safetensors")):
            return None
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == ENDING)
        if len(found) > 1 and not _is_part(found[0]):
            names = ", ".join(p.name for p in found)
            raise InputError(f"{path}: contains {len(found)} GGUF files ({names}); give one of them as `source`")
        if not found:
            return None
        path = found[0]
    elif not isfile(path):
        raise InputError(f"{path}: there is no such file; check `source`")
    if _is_part(path):
        raise InputError(f"{path}: a part of a split model; join the parts with `llama-gguf-split --merge`, and give the result")
    return path


def _is_part(path: Path) -> bool:
    """Whether a file is called `...-00001-of-00003.gguf`."""
    *_, number, of, count = ["", "", "", *path.stem.split("-")]
    return of == "of" and number.isdigit() and count.isdigit()


class GgufModel:
    """A GGUF file: its metadata, its config and tokenizer as transformers reads them, and its tensors, one at a time."""

    def __init__(self, file: Path | str):
        """Reads the metadata alone. Raises InputError if the file is damaged, or contains a model that is not supported."""
        from transformers.integrations.gguf import read_gguf_metadata

        self.file = Path(file)
        try:  # far faster than the reader of gguf, which makes arrays of every token
            self.metadata, self.names = read_gguf_metadata(str(self.file))
        except DAMAGED as error:
            raise InputError(f"{self.file}: incomplete or not a GGUF file ({first_line(error)})") from error
        self.architecture = str(self.metadata["general.architecture"])
        self._check()

    def own(self, name: str) -> Any:
        """A value of the metadata that is named after the architecture; None if the file has none of this name."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def _check(self) -> None:
        """Raise InputError for what would be read as another model than the one in the file."""
        if (parts := self.metadata.get("split.count", 1)) > 1:
            raise InputError(f"{self.file}: one of {parts} parts of a model; join them with `llama-gguf-split --merge`")
        from transformers.integrations import GGUF_CONFIG_MAPPING

        family = FAMILIES.get(self.architecture, self.architecture)
        if family not in ARCHITECTURES or self.architecture not in GGUF_CONFIG_MAPPING or self.own("expert_count"):
            what = "a mixture of experts" if self.own("expert_count") else f"of the architecture {self.architecture!r}"
            raise InputError(f"{self.file}: {what}, which is not read from GGUF; {CURE}")
        kind, factor = self.own("rope.scaling.type"), self.own("rope.scaling.factor")
        if kind not in (None, "none") and factor not in (None, 0.0, 1.0):
            raise InputError(
                f"{self.file}: its positions are scaled ({kind}, factor {factor:g}), which transformers does not read from GGUF; "
                f"{CURE}"
            )
        width = self.own("attention.key_length")
        if self.architecture in ("gemma2", "gemma3") and width not in (None, 256):
            raise InputError(
                f"{self.file}: a {self.architecture} model with heads of {width} channels, whose attention scale a GGUF file "
                f"does not tell; {CURE}"
            )

    @cached_property
    def kind(self) -> str:
        """The type of the file, such as Q4_K_M."""
        from gguf import LlamaFileType

        number = self.metadata.get("general.file_type", -1)
        known = {int(of): of.name.removeprefix("MOSTLY_").removeprefix("ALL_") for of in LlamaFileType}
        return known.get(number, "unknown type")

    @property
    def dtype(self) -> str:
        """The dtype that stores the matrices as they are, or bfloat16 if they are quantised."""
        return EXACT.get(self.kind, "bfloat16")

    @cached_property
    def tensors(self) -> list[Any]:
        """The tensors of the file: names, types, shapes and places. Raises InputError if the file ends within one."""
        from gguf import GGUFReader

        try:
            return list(GGUFReader(self.file).tensors)
        except DAMAGED as error:
            raise InputError(f"{self.file}: incomplete GGUF file ({first_line(error)})") from error

    @cached_property
    def config(self) -> Any:
        """The config of transformers, but for scaled positions. Raises InputError if there is none for the file."""
        from transformers import AutoConfig
        from transformers.integrations import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

        family = FAMILIES.get(self.architecture, self.architecture)
        names: dict[str, Any] = GGUF_CONFIG_MAPPING
        content: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(self.architecture) or {})
        for prefix in (self.architecture, "tokenizer"):
            for key, name in (names[prefix] | MISSED.get(prefix, {})).items():
                if name not in (None, -1) and f"{prefix}.{key}" in self.metadata:
                    content[name] = self.metadata[f"{prefix}.{key}"]
        content["tie_word_embeddings"] = "output.weight" not in self.names
        content.setdefault("vocab_size", self.metadata.get("tokenizer.ggml.tokens"))
        try:
            return AutoConfig.for_model(family, **content)
        except DAMAGED as error:
            raise InputError(f"{self.file}: transformers makes no config of it ({first_line(error)})") from error

    def scale_positions(self) -> None:
        """Set Llama 3's scaling of positions in the config, if the file has its result. Raises InputError for another one."""
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        (found,) = [t for t in self.tensors if t.name == "rope_freqs.weight"] or [None]
        if found is None:
            return
        config, stored = self.config, torch.from_numpy(self.values(found)).double()
        plain = dict(config.rope_parameters)
        base = plain["rope_theta"] ** (-torch.arange(0, 2 * len(stored), 2, dtype=torch.float64) / (2 * len(stored)))
        for factor in FACTORS:
            config.rope_parameters = {**plain, **SCALING, "factor": factor}
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            if torch.allclose(base / scaled.double(), stored, rtol=1e-4):
                return
        raise InputError(
            f"{self.file}: its positions are scaled by factors (rope_freqs) that are not those of a Llama 3 model; {CURE}"
        )

    @contextmanager
    def described(self) -> Iterator[Path]:
        """Context manager: a folder with config.json alone."""
        from winnow.models.classes import model_class

        with TemporaryDirectory(prefix="winnow-") as folder:
            config = self.config
            config.architectures = [model_class(config).__name__]
            config.save_pretrained(folder)
            yield Path(folder)

    def tokenizer(self) -> Any:
        """The tokenizer of transformers. Raises InputError if the file has none, or one of a kind that is not supported."""
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        if not self.metadata.get("tokenizer.ggml.tokens"):
            raise InputError(f"{self.file}: has no tokenizer; {CURE}")
        try:
            found = AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name, local_files_only=True)
        except Exception as error:  # the library tokenizers raises plain Exception
            raise InputError(f"{self.file}: no usable tokenizer ({first_line(error)}); {CURE}") from error
        if self.metadata.get("tokenizer.ggml.pre") in DIGITS:  # transformers splits as GPT-2
            split = found.backend_tokenizer.pre_tokenizer
            found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), split]
            )
        return found

    def values(self, tensor: Any) -> ndarray:
        """A tensor of the file, dequantised to float32, in the shape of PyTorch. Raises InputError for an unknown type."""
        import numpy as np
        from gguf import dequantize

        stored = tensor.data
        raw = np.fromfile(self.file, stored.dtype, stored.size, offset=int(tensor.data_offset)).reshape(stored.shape)
        try:
            return dequantize(raw, tensor.tensor_type).astype(np.float32, copy=False)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{self.file}: {tensor.name} is {tensor.tensor_type.name}, which is not supported") from error

    def records(self, dtype: str | None) -> dict[str, Any]:
        """{name in the model of transformers: dtype and shape} of the tensors that the directory will contain."""
        from winnow.models.classes import empty_model

        short = next(short for short, long in NAMES.items() if long == (dtype or self.dtype))
        with self.described() as folder:
            model = empty_model(folder)
        tied = model.all_tied_weights_keys
        return {n: {"dtype": short, "shape": list(t.shape)} for n, t in model.state_dict().items() if n not in tied}

    def converted(self, dtype: str) -> Iterator[tuple[str, Tensor]]:
        """(name in the model of transformers, tensor) of every tensor of the file. Raises InputError, naming the tensor, for one
        that has no place in the model."""
        import torch
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        from winnow.models.classes import empty_model

        with self.described() as folder:
            model = empty_model(folder)
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=model.config.to_dict())
        places = get_gguf_hf_weights_map(model, processor)
        for tensor in self.tensors:
            if tensor.name == "rope_freqs.weight":  # in the config
                continue
            beside: dict[str, Any] = {"tensors": {}}  # where GPT-2's processor puts a head
            found = processor.process(self.values(tensor), tensor.name, tensor_key_mapping=places, parsed_parameters=beside)
            name = places.get(found.name) or next(iter(beside["tensors"]), None)
            if name is None:
                raise InputError(
                    f"{self.file}: {tensor.name} has no place in a {type(model).__name__}; the file is of another kind of model, "
                    f"{CURE}"
                )
            value = beside["tensors"].get(name)
            yield name, (torch.from_numpy(found.weights.copy()) if value is None else value).to(getattr(torch, dtype))


def dequantize_model(file: Path | str, directory: Path, dtype: str | None = None) -> Dequantized:
    """Write the model of a GGUF file to an empty directory as safetensors of `dtype`, with config and tokenizer; returns what the
    directory's gguf.json says of it. One tensor is in memory at a time.

    `dtype`: that of the file's matrices by default, or bfloat16 if they are quantised. Raises InputError if the file is damaged,
    contains a model that is not supported, or has no tokenizer."""
    from winnow.models.weights import SHARD_BYTES, write_weights

    model = GgufModel(file)
    dtype = dtype or model.dtype
    model.scale_positions()  # reads the places of the tensors, which are not there in a file that was cut
    model.tokenizer().save_pretrained(directory)
    with model.described() as folder:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**content, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    size = write_weights(directory, model.converted(dtype), SHARD_BYTES)
    types = dict(sorted(Counter(t.tensor_type.name for t in model.tensors).items()))
    facts: Dequantized = {
        "file": model.file.name,
        "sha256": file_digest(model.file),
        "type": model.kind,
        "types": types,
        "dtype": dtype,
    }
    (directory / FROM_GGUF).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    log.info("%s (%s) dequantised to %s: %d bytes", model.file, model.kind, dtype, size)
    return facts
