"""The quantization method `winnow` of vLLM: importing this module registers it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from winnow.engines.vllm.checked import Described, check_directory, check_parallel, described
from winnow.engines.vllm.linear import CompressedLinearMethod
from winnow.engines.vllm.parts import Places, Tensors
from winnow.errors import InputError
from winnow.models.config_json import METHOD


@register_quantization_config(METHOD)
class WinnowQuantization(QuantizationConfig):
    """The `quantization_config` of a compressed checkpoint. vLLM makes it before it starts its processes, and sends it to
    them."""

    def __init__(self, content: dict[str, Any]):
        super().__init__()
        self.content = content
        self.hf_config: Any = None
        self.places = Places()
        self.tensors = Tensors()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WinnowQuantization:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks the config, and the headers of the files if they are on this machine. Raises InputError as `described` does."""
        self.hf_config = hf_config
        found = described(hf_config, self.content)
        if Path(model_name).is_dir():
            check_directory(found, Path(model_name))

    @cached_property
    def described(self) -> Described:
        """The compressed model, in the process that runs it."""
        return described(self.hf_config, self.content)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer: that of winnow if one of its matrices is compressed."""
        if isinstance(layer, RoutedExperts):
            raise InputError(f"{prefix}: winnow's plug-in for vLLM does not run mixtures of experts; load it with transformers")
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        if not any(part in self.described.layers for part in names):
            return UnquantizedLinearMethod()
        parallel = get_current_vllm_config().parallel_config
        check_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        self.places.add(prefix, names)
        return CompressedLinearMethod(self.described, names, self.tensors)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The names under which vLLM's layers find their tensors. vLLM calls it when the model is made and nothing is loaded.

        Raises InputError if a compressed matrix is in no layer."""
        if lost := self.places.missing(n for n, layout in self.described.layers.items() if layout.get("part") != "activation"):
            raise InputError(f"vLLM's {self.hf_config.model_type} model has no layer {lost[0]}; load it with transformers")
        return WeightsMapper(orig_to_new_renaming=[self.places])

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # everything is computed by PyTorch

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all of it is in config.json
