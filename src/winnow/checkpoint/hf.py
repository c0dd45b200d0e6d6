"""The loader that transformers finds after `import winnow`: builds the compressed modules, and loads strictly.

A compressed checkpoint says in `config.json` what its modules are:
`quantization_config: {quant_method: winnow, format_version: 1 or 2, layers: {module: layout}}`.
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
                f"the checkpoint has winnow format {format_version}, this installation reads formats {known}; "
                "install the version that wrote it (its README.md names it), or the newest: pip install --upgrade winnow"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = check_layouts(layers)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format_version": self.format_version, "layers": self.layers}


class WinnowQuantizer(HfQuantizer):
    """Puts the compressed modules into the empty model, and refuses files that lack a tensor of the class that wrote them or hold
    one that it does not know. A model of another class (the encoder alone, or another head on it) takes from them what it has."""

    requires_calibration = True
    quantization_config: WinnowConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if checkpoint_files is None:
            raise InputError(
                "this transformers does not say which files it loads, so they cannot be checked; upgrade transformers"
            )
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
        self.quantization_config.layers = moved(layers, _base(whole), _base(model))
        install(model, self.quantization_config.layers)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without those that make one parameter of the matrices of all experts, which are modules of their own here."""
        return [t for t in weight_conversions if isinstance(t, WeightRenaming)]

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


def _base(model: Any) -> str:
    """What the names of the modules below a head begin with; nothing if there is no head."""
    prefix = model.base_model_prefix
    return f"{prefix}." if hasattr(model, prefix) else ""


def _check_files(config: Any, files: list[str]) -> None:
    """Raise InputError for files that are not safetensors or not of the model's directory, and for code beside them."""
    if getattr(config, "auto_map", None):
        raise InputError(f"{config.name_or_path}: its config names code (auto_map); a checkpoint has none, and none is run")
    folder = Path(config.name_or_path)
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise InputError(f"{file}: a winnow checkpoint is stored in safetensors; other files are refused")
        inside = Path(file).is_relative_to(folder) and ".." not in Path(file).relative_to(folder).parts
        if folder.is_dir() and not inside:
            raise InputError(f"{file}: not a file of {folder}; a checkpoint's index cannot name files elsewhere")


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reloaded module finds itself registered
    register_quantization_config(METHOD)(WinnowConfig)
    register_quantizer(METHOD)(WinnowQuantizer)
