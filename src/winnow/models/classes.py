"""The transformers class of a model directory, from its config alone and never from code in the directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError, first_line
from winnow.models.config_json import read_content

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The purpose of the classes in these mappings; the first is assumed for a config without `architectures`.
PURPOSES = ("CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")
# What transformers raises for an unusable config, or for one that needs a library that is not installed.
UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError, ImportError)


def read_config(directory: Path | str) -> PreTrainedConfig:
    """The config of a model directory. Raises InputError, naming the file, if transformers does not know the model type, if it
    needs custom code, or if it would change what the loaded model computes (see `winnow.models.config_json`)."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path, content = Path(directory) / "config.json", read_content(directory)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = "; it names custom code (auto_map), which is never run" if "auto_map" in content else ""
        raise InputError(f"{path}: transformers does not know the model_type {kind!r}{code}")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, *UNUSABLE) as error:
        raise InputError(f"{path}: invalid config of {kind}: {first_line(error)}") from error


def classes_of(config: PreTrainedConfig) -> dict[str, list[type[PreTrainedModel]]]:
    """{purpose: transformers classes} for this config; `BASE` has no head."""
    from transformers.models.auto import modeling_auto

    found = {p: getattr(modeling_auto, f"MODEL_FOR_{p}_MAPPING").get(type(config), None) for p in PURPOSES}
    found["BASE"] = modeling_auto.MODEL_MAPPING.get(type(config), None)
    return {p: list(c) if isinstance(c, tuple) else [c] for p, c in found.items() if c is not None}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that `architectures` in the config names; the causal language model if it names none. Raises
    InputError if transformers has no such class for the config."""
    known = [cls for classes in classes_of(config).values() for cls in classes]
    named = getattr(config, "architectures", None)
    name = named[0] if named else None
    for cls in known:
        if name is None or cls.__name__ == name:
            return cls
    valid = ", ".join(cls.__name__ for cls in known) or "none"
    raise InputError(f"{config.model_type}: `architectures` names {name!r}, which transformers does not have for it ({valid})")


def empty_model(directory: Path | str, dtype: str | None = None) -> PreTrainedModel:
    """The model of a directory without its weights, on the device `meta`, which takes no memory. With `dtype`, the model is to
    be run in that dtype, and buffers that are not stored are real tensors. Raises InputError, naming the config, if the model
    cannot be created."""
    import torch

    from winnow.models.experts import unfuse

    config = read_config(directory)
    cls = model_class(config)
    try:
        if dtype is None:
            with torch.device("meta"):
                return unfuse(cls._from_config(config))
        with _empty_parameters():
            return unfuse(cls._from_config(config, dtype=getattr(torch, dtype)))
    except UNUSABLE as error:
        raise InputError(
            f"{Path(directory) / 'config.json'}: {cls.__name__} cannot be created from it: {first_line(error)}"
        ) from error


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Context manager that moves every new parameter to `meta` as it is registered; buffers are left unchanged."""
    from torch import nn

    register: Any = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    cls: Any = nn.Module
    cls.register_parameter = registered
    try:
        yield
    finally:
        cls.register_parameter = register


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether the model predicts the next token from those before it, as perplexity requires."""
    classes = classes_of(config)
    decoder = (
        "MASKED_LM" not in classes or config.is_decoder
    )  # a masked language model attends to later tokens unless it is a decoder
    return bool(model_class(config) in classes.get("CAUSAL_LM", []) and decoder)
