"""The loader that `import winnow` registers with transformers: builds the compressed modules and loads strictly.

The `config.json` of a compressed checkpoint describes its modules:
`quantization_config: {quant_method: winnow, format_version: 1, 2 or 3, layers: {module: layout}}`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from winnow.checkpoint.layouts import check_layouts, install, moved
from winnow.errors import InputError
from winnow.models.classes import model_class
from winnow.models.config_json import METHOD
from winnow.models.experts import unfuse
from winnow.models.naming import stored_tensors
from winnow.structures.base import FORMATS


class WinnowConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint. Raises InputError for a format this version cannot read."""

    def __init__(self, format_version: Any = None, layers: Any = None, **kwargs: Any):
        if format_version not in FORMATS:
            known = ", ".join(map(str, FORMATS))
            raise InputError(
                f"the checkpoint has winnow format {format_version}, but this installation reads formats {known}; "
                "install the version that wrote it (see its README.md), or the newest: pip install --upgrade winnow"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = check_layouts(layers)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format_version": self.format_version, "layers": self.layers}


class WinnowQuantizer(HfQuantizer):
    """Puts the compressed modules into the empty model, and refuses files with missing or unexpected tensors of the class that
    wrote them. A model of another class (the encoder alone, or with another head) loads the tensors that it has."""

    requires_calibration = True
    quantization_config: WinnowConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if checkpoint_files is None:
            raise InputError("transformers does not report which files it loads, so they cannot be checked; upgrade transformers")
        _check_files(model.config, checkpoint_files)
        files = [Path(file) for file in checkpoint_files]
        unfuse(model)
        layers, written = self.quantization_config.layers, model_class(model.config)
        if type(model) is written:
            install(model, layers)
            stored_tensors(model, files)
            return
        with torch.device("meta"):
            whole = unfuse(written._from_config(copy.deepcopy(model.config)))
        install(whole, layers)
        stored_tensors(whole, files)
        kept = {name for name, _ in model.named_modules()}  # without the head of the class that wrote it
        layers = {name: layout for name, layout in layers.items() if name.startswith(_base(whole)) or name in kept}
        self.quantization_config.layers = moved(layers, _base(whole), _base(model))
        install(model, self.quantization_config.layers)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Removes conversions that fuse the matrices of all experts, which are separate modules here. transformers below
        5.22 gives no model."""
        return [t for t in weight_conversions if isinstance(t, WeightRenaming)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.is_quantized = False  # so that `.half()` and `.to(dtype)` work as on any model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _base(model: Any) -> str:
    """The prefix of the base model's modules in a model with a head; empty if there is no head."""
    prefix = model.base_model_prefix
    return f"{prefix}." if hasattr(model, prefix) else ""


def _check_files(config: Any, files: list[str]) -> None:
    """Raise InputError for files that are not safetensors or not of the model's directory, and for code beside them."""
    if getattr(config, "auto_map", None):
        raise InputError(f"{config.name_or_path}: its config names custom code (auto_map), which is never run; delete the key")
    folder = Path(config.name_or_path)
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise InputError(f"{file}: a winnow checkpoint is stored in safetensors; other files are refused")
        inside = Path(file).is_relative_to(folder) and ".." not in Path(file).relative_to(folder).parts
        if folder.is_dir() and not inside:
            raise InputError(f"{file}: not a file of {folder}; the index of a checkpoint must not name files elsewhere")


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # already registered if the module is reloaded
    register_quantization_config(METHOD)(WinnowConfig)
    register_quantizer(METHOD)(WinnowQuantizer)
