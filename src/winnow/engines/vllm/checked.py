"""What a checkpoint's config describes, checked for vLLM before anything is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.checkpoint.hf import WinnowConfig
from winnow.checkpoint.layouts import install
from winnow.engines.vllm.passing import Passing, passing_of
from winnow.errors import InputError
from winnow.models.classes import is_causal, model_class
from winnow.models.files import weight_files
from winnow.models.naming import stored_tensors
from winnow.structures.base import rotates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# `model_type` of the families whose classes in vLLM have been run with compressed checkpoints (tests/engines). Other classes may
# name or order their matrices differently.
FAMILIES = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")


@dataclass(frozen=True)
class Described:
    """A compressed model without memory for its tensors: transformers' class with the modules of the checkpoint on `meta`."""

    model: PreTrainedModel
    layers: dict[str, dict[str, Any]]  # layouts by module name
    passing: dict[str, Passing]  # modules of FFNs without an activation, by name

    def take(self, name: str) -> nn.Module:
        """Remove a module from the model, which must not keep its tensors once it has some."""
        parent, _, child = name.rpartition(".")
        module = self.model.get_submodule(name)
        setattr(self.model.get_submodule(parent), child, nn.Identity())
        return module


def described(config: PreTrainedConfig, quantization: dict[str, Any]) -> Described:
    """The model of a config of transformers and its `quantization_config`.

    Raises InputError, in one line, for a format or structure that this version does not know, a family that is not in `FAMILIES`,
    a model that is no causal language model, a layout that does not fit the model, and a form that vLLM cannot run."""
    layers = WinnowConfig(**{key: value for key, value in quantization.items() if key != "quant_method"}).layers
    if config.model_type not in FAMILIES:
        raise InputError(
            f"winnow's plug-in for vLLM does not know the family {config.model_type!r}, only {', '.join(FAMILIES)}; load the "
            "checkpoint with transformers, or serve its dense export: winnow export <checkpoint> <new directory>"
        )
    if outer := next((name for name, layout in layers.items() if layout.get("embeddings") or name == "lm_head"), None):
        raise InputError(
            f"winnow's plug-in for vLLM does not run a compressed {outer}; load the checkpoint with transformers, or serve its "
            "dense export: winnow export <checkpoint> <new directory>"
        )
    cls = model_class(config)
    if not is_causal(config):
        raise InputError(f"winnow's plug-in for vLLM runs causal language models, not {cls.__name__}; load it with transformers")
    for name, layout in layers.items():
        if rotates(layout):
            raise InputError(
                f"{name}: winnow's plug-in for vLLM does not rotate the inputs of rounded matrices; load the checkpoint with "
                "transformers, or compress with `rotations: [none]`"
            )
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config))
    passing = passing_of(model, layers)
    install(model, layers)
    return Described(model, layers, passing)


def check_directory(found: Described, directory: Path) -> None:
    """Compares the tensors of the model with the headers of its files. Raises InputError for a tensor that is missing, unknown,
    or of another shape."""
    stored_tensors(found.model, weight_files(directory))


def check_parallel(tensor: int, pipeline: int) -> None:
    """Raises InputError for a model that is divided between processes, whose parts are no matrices of the checkpoint."""
    for what, count in (("tensor", tensor), ("pipeline", pipeline)):
        if count > 1:
            raise InputError(
                f"winnow's plug-in for vLLM runs a compressed model in one process, but {what}_parallel_size is {count}; set it "
                "to 1, and use data_parallel_size for several processes"
            )
