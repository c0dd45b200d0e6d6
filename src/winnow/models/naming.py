"""Maps the tensors of weight files to those of a model, by the rules with which transformers loads them."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
OLD_BUFFERS = re.compile(r"\.attn\.masked_bias$")  # of GPT-2 files; transformers ignores them without a rule of the class


@dataclass(frozen=True)
class Stored:
    """File, name, dtype and shape under which a tensor of a model is stored."""

    file: Path
    key: str
    dtype: str
    shape: list[int]


def stored_tensors(model: PreTrainedModel, files: list[Path]) -> dict[str, Stored]:
    """{name in the model: its place in the files}; only headers are read. Of tied tensors, the source is always included,
    whichever of them the files contain; the targets only if the files contain them too.

    Tensors that the class does not use are logged: ignored keys of the class, buffers that it computes itself, and tensors of
    other heads. Raises InputError with file and tensor for a tensor that is missing, unknown, stored twice or of another shape
    than the config says, and for incomplete files.
    """
    # Also those that the class would initialise (`_keys_to_ignore_on_load_missing`): no tensor may be random.
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    name_of = _renaming(model, expected)
    found: dict[str, Stored] = {}
    unknown: dict[str, Stored] = {}
    for file in files:
        for key, (dtype, shape) in _header(file).items():
            name, place = name_of(key), Stored(file, key, dtype, shape)
            if name not in expected:
                unknown[name] = place
            elif shape != expected[name]:
                raise InputError(f"{file}: {key} has shape {shape}, the config says {expected[name]}")
            elif name in found:
                raise InputError(f"{file}: {key} and {found[name].key} are both the tensor {name}; remove one of them")
            else:
                found[name] = place
    _check_unknown(model, unknown)
    for target, source in model.all_tied_weights_keys.items():
        if target in found and source in expected and source not in found:
            found[source] = found.pop(target)  # transformers ties to whichever exists
    missing = sorted(set(expected) - set(found) - set(model.all_tied_weights_keys))
    if missing:
        counts = f"{len(missing)} of {len(expected)} are"
        raise InputError(
            f"{files[0].parent}: the tensor {missing[0]} is missing from the weights ({counts}); they are damaged, or belong to "
            f"another model than the {type(model).__name__} in config.json"
        )
    return found


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """{tensor: (dtype, shape)} of a safetensors file; its header is checked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stream:  # `pt` maps all of the file
            parts = {key: stream.get_slice(key) for key in stream.keys()}
            return {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: incomplete or not a safetensors file ({first_line(error)})") from error


def _renaming(model: PreTrainedModel, expected: dict[str, list[int]]) -> Callable[[str], str]:
    """A function from a tensor's name in a file to its name in the model, with the renamings and prefix of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]

    def name_of(key: str) -> str:
        renamed, _ = rename_source_key(key, renamings, [], model.base_model_prefix, expected)
        if renamed not in expected and key in expected:  # not renamed, as in `from_pretrained`
            renamed, _ = rename_source_key(key, [], [], model.base_model_prefix, expected)
        return renamed

    return name_of


def _check_unknown(model: PreTrainedModel, unknown: dict[str, Stored]) -> None:
    """Log the tensors that the model does not use. Raises InputError for one below a module of the model: it has been renamed, or
    belongs to a layer beyond those of the config, to a quantised matrix, or to an adapter."""
    from transformers.utils.loading_report import LoadStateDictInfo

    if not unknown:
        return
    kept: Any = {"missing_keys": set(), "mismatched_keys": set(), "error_msgs": [], "conversion_errors": {}}
    report = LoadStateDictInfo(unexpected_keys=set(unknown), skipped_pp_keys=set(), **kept)
    model._adjust_missing_and_unexpected_keys(report)  # removes the ignored keys of the class
    own = {name for name, _ in model.named_buffers()}  # unexpected buffers are not persistent: the model computes them
    left = sorted(name for name in report.unexpected_keys - own if not OLD_BUFFERS.search(name))
    if below := [name for name in left if not _of_a_head(model, name)]:
        whole = _base_tensors(model)
        for name in below:
            if name.removeprefix(f"{model.base_model_prefix}.") not in whole:
                raise InputError(
                    f"{unknown[name].file}: unexpected tensor {unknown[name].key}: {type(model).__name__} has no such tensor; "
                    "it was renamed, the file is damaged, or config.json belongs to another model"
                )
    log.info("not used by %s: %s", type(model).__name__, ", ".join(sorted(place.key for place in unknown.values())))


def _of_a_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor that the model lacks belongs to another head: it is neither below the base model nor below a matrix of
    the model."""
    base: Any = model.base_model
    prefix, _, _ = name.partition(".")
    if prefix == model.base_model_prefix or prefix in {child for child, _ in base.named_children()}:
        return False
    modules, path = dict(model.named_modules()), name
    while path := path.rpartition(".")[0]:
        if path in modules:
            return bool(list(modules[path].children()))
    return True


def _base_tensors(model: PreTrainedModel) -> set[str]:
    """The tensor names of the family's base model with all its parts; models with a head may lack its pooler."""
    import torch

    from winnow.models.classes import classes_of

    names: set[str] = set()
    for cls in classes_of(model.config).get("BASE", []):
        with torch.device("meta"):
            names |= set(cls._from_config(copy.deepcopy(model.config)).state_dict())
    return names
