"""Checks of a model's config.json, before transformers reads it.

`from_pretrained` reads more from config.json than the shape of a model. Most of it has the same effect in all ways in which
winnow loads models and needs no check: dropout and `gradient_checkpointing` only act in training, `dtype` and `use_cache` are
always given, `tie_word_embeddings` is compared with the tensors, `auto_map` is never followed, and device plans are for
distributed loading. Keys that change what is computed, or where weights or code come from, are refused here: `from_pretrained`
follows them, but code that reads the tensors one by one does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from winnow.errors import InputError, first_line
from winnow.io.tensors import read_header
from winnow.models.files import weight_files

MOST_LAYERS = 10_000  # more layers would take minutes and gigabytes to build even without weights
QUANTISED = "quantization_config"
METHOD = "winnow"  # the `quant_method` of compressed checkpoints
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # the last two for positions and masks in old files


def read_content(directory: Path | str) -> dict[str, Any]:
    """The content of a model directory's config.json. Raises InputError, naming file and key, if it is not a mapping or has a key
    that is refused; compressed checkpoints of winnow are accepted."""
    path = Path(directory) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
        parts = list(_parts("", content))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a model config: {first_line(error)}") from error
    for where, part in parts:
        _check_keys(path, where, part)
        method = part.get(QUANTISED)
        if method is not None and not (not where and _method_of(method) == METHOD):
            _refuse_quantised(path, where, _method_of(method))
    return content


def check_source(directory: Path | str) -> None:
    """Raise InputError as `read_content` does, and for a compressed checkpoint of winnow, which cannot be compressed again."""
    if read_content(directory).get(QUANTISED) is not None:
        raise InputError(
            f"{directory}: a compressed checkpoint of winnow, not a dense model; use the model that it was made from, or export "
            "it as a dense model with `python -m winnow export`"
        )


def _parts(where: str, part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix of its keys, mapping): the config, and the configs of a composite model's parts in it."""
    yield where, part
    for key, value in part.items():
        if isinstance(value, dict) and key != QUANTISED:
            yield from _parts(f"{where}{key}.", value)


def _check_keys(path: Path, where: str, part: dict[str, Any]) -> None:
    """Raise InputError for a key with which transformers would not load the model that the tensors describe."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        count = part.get(key, 0)
        if not isinstance(count, int) or not 0 <= count <= MOST_LAYERS:
            raise InputError(f"{path}: {where}{key} is {count!r}; at most {MOST_LAYERS:,} layers are supported")
    if "transformers_weights" in part:
        raise InputError(
            f"{path}: {where}transformers_weights names a weight file, which is refused; delete the key and rename the file"
        )
    if part.get("fusion_config") is not None:
        raise InputError(f"{path}: {where}fusion_config replaces modules when transformers loads the model; delete the key")
    if part.get("return_dict", True) is not True:
        raise InputError(f"{path}: {where}return_dict makes the model return tuples, which have no logits; delete the key")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(part.get(key)):
            raise InputError(f"{path}: {where}{key} names code of a hub repository, which is never run; delete the key")


def _method_of(value: Any) -> str:
    return str(value.get("quant_method")) if isinstance(value, dict) and "quant_method" in value else "an unnamed method"


def _refuse_quantised(path: Path, where: str, method: str) -> None:
    """Raise InputError for quantised weights, and for a quantisation key that was left in the config of dense weights."""
    for file in weight_files(path.parent):
        for key, record in read_header(file).items():
            mask = record["shape"][:2] == [1, 1]
            if len(record["shape"]) > 1 and record["dtype"] not in PLAIN and not mask:
                raise InputError(
                    f"{path.parent}: the weights are quantised by {method} ({where}{QUANTISED} in config.json; {key} is "
                    f"{record['dtype']}), but only dense weights can be compressed; use the original model, or convert it with "
                    "transformers: model.dequantize(), then save_pretrained"
                )
    raise InputError(
        f"{path}: {where}{QUANTISED} asks for {method}, but the weights are not quantised: transformers would load another "
        "model than the one that is compressed; delete the key, which tools leave when they merge to 16 bits"
    )
