"""The loader that transformers finds after `import winnow`: builds the compressed modules, and loads strictly.

A compressed checkpoint says in `config.json` what its modules are:
`quantization_config: {quant_method: winnow, format_version: 1, layers: {module: layout}}`.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from winnow.errors import InputError
from winnow.naming import canonical_names
from winnow.structures import STRUCTURES
from winnow.structures.base import FORMAT_VERSION, METHOD


class WinnowConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint. Raises InputError for a format this version cannot read."""

    def __init__(self, format_version: int, layers: dict[str, dict[str, Any]], **kwargs: Any):
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has winnow format {format_version}, this installation reads format {FORMAT_VERSION}; "
                "install the version that wrote it (its README.md names it), or the newest: pip install --upgrade winnow"
            )
        unknown = sorted({layout["kind"] for layout in layers.values()} - set(STRUCTURES))
        if unknown:
            raise InputError(f"the checkpoint uses the structure {unknown[0]!r}, which this winnow does not have; upgrade winnow")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = layers

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format_version": self.format_version, "layers": self.layers}


class WinnowQuantizer(HfQuantizer):
    """Puts the compressed modules into the empty model and refuses files that do not hold exactly its tensors."""

    requires_calibration = True
    quantization_config: WinnowConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        put_modules(model, self.quantization_config.layers)
        if checkpoint_files is None:
            raise InputError(
                "this transformers does not say which files it loads, so they cannot be checked; upgrade transformers"
            )
        check_tensors(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.is_quantized = False  # nothing is: `.half()` and `.to(dtype)` work as on any model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def put_modules(model: Any, layers: dict[str, dict[str, Any]]) -> None:
    """Put empty compressed modules of the layouts into the model, and tie what they share.

    Raises InputError for a module that the model does not have."""
    for name, layout in layers.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"the checkpoint's config names {name}, which {type(model).__name__} does not have") from error
        with torch.device("meta"):
            module = STRUCTURES[layout["kind"]].module(layout, dense)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    for name, layout in layers.items():
        model.all_tied_weights_keys.update(STRUCTURES[layout["kind"]].share(model, name, layout))


def check_tensors(model: Any, files: list[str]) -> None:
    """Raise InputError unless the files hold the model's tensors, each once, in the right shape."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    name_of = canonical_names(model)
    found: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise InputError(f"{file}: a winnow checkpoint is stored in safetensors; other files are refused")
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():
                name = name_of(key)
                if name is None:
                    continue
                shape = stream.get_slice(key).get_shape()
                if shape != expected[name]:
                    raise InputError(f"{file}: {key} has shape {shape}, the config says {expected[name]}")
                if name in found:
                    raise InputError(f"{file}: the tensor {name} is stored twice; the checkpoint is damaged")
                found.add(name)
    for name in sorted(set(expected) - found - set(model.all_tied_weights_keys)):
        raise InputError(f"{files[0]}: the tensor {name} is missing; the checkpoint is damaged or was renamed")


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reloaded module finds itself registered
    register_quantization_config(METHOD)(WinnowConfig)
    register_quantizer(METHOD)(WinnowQuantizer)
