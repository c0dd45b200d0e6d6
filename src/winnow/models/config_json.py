"""What a model's config.json may say, read before transformers reads it.

`from_pretrained` takes more from config.json than the shape of a model. Most of it is the same for every way of loading that
winnow has, and needs no rule: dropout and `gradient_checkpointing` act in training alone, `dtype` and `use_cache` are always
given, `tie_word_embeddings` is compared with the tensors, `auto_map` is never followed, plans for several devices are for
distributed loading. What changes what is computed, or where weights or code come from, while the tensors look as they are, is
refused here: `from_pretrained` follows it, and whatever reads the tensors one by one does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from winnow.errors import InputError, first_line
from winnow.io.tensors import read_header
from winnow.models.files import weight_files

MOST_LAYERS = 10_000  # a model of that many would take minutes and gigabytes to build even without its weights
QUANTISED = "quantization_config"
METHOD = "winnow"  # the `quant_method` of compressed checkpoints
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # the last two of positions and masks, which old files hold


def read_content(directory: Path | str) -> dict[str, Any]:
    """The content of a model directory's config.json. Raises InputError, naming file and key, if it is no mapping or asks for
    what is refused; a compressed checkpoint of winnow may say that it is one."""
    path = Path(directory) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
        parts = list(_parts("", content))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a model's config: {first_line(error)}") from error
    for where, part in parts:
        _check_keys(path, where, part)
        method = part.get(QUANTISED)
        if method is not None and not (not where and _method_of(method) == METHOD):
            _refuse_quantised(path, where, _method_of(method))
    return content


def check_source(directory: Path | str) -> None:
    """Raise InputError as `read_content` does, and for a compressed checkpoint of winnow, which is no model to compress."""
    if read_content(directory).get(QUANTISED) is not None:
        raise InputError(
            f"{directory}: a compressed checkpoint of winnow, not a dense model; give the model that it was made from, or a "
            "dense model that `python -m winnow export` writes of it"
        )


def _parts(where: str, part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what its keys begin with, mapping): the config, and those of a composite model's parts in it."""
    yield where, part
    for key, value in part.items():
        if isinstance(value, dict) and key != QUANTISED:
            yield from _parts(f"{where}{key}.", value)


def _check_keys(path: Path, where: str, part: dict[str, Any]) -> None:
    """Raise InputError for a key that makes transformers load something else than the tensors and the shape say."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        count = part.get(key, 0)
        if not isinstance(count, int) or not 0 <= count <= MOST_LAYERS:
            raise InputError(f"{path}: {where}{key} is {count!r}; at most {MOST_LAYERS:,} layers are read")
    if "transformers_weights" in part:
        raise InputError(
            f"{path}: names a weight file of its own ({where}transformers_weights), which is refused; rename the file"
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
    """Raise InputError for weights that are stored quantised, and for a key that was left behind when they were merged."""
    for file in weight_files(path.parent):
        for key, record in read_header(file).items():
            mask = record["shape"][:2] == [1, 1]
            if len(record["shape"]) > 1 and record["dtype"] not in PLAIN and not mask:
                raise InputError(
                    f"{path.parent}: the weights are quantised by {method} ({where}{QUANTISED} in config.json; {key} is "
                    f"{record['dtype']}), and plain ones are compressed; give the model that they were made from, or write one "
                    "with transformers: model.dequantize(), then save_pretrained"
                )
    raise InputError(
        f"{path}: {where}{QUANTISED} asks for {method}, but the weights are stored plain: transformers would load another model "
        "than the one whose tensors are compressed; delete the key, which tools leave behind when they merge to 16 bits"
    )
