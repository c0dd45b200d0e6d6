"""LoRA of peft on compressed models; `import winnow` registers it with peft, and the format with transformers.

`target_modules` names the matrices as in the dense model, or is `all-linear`. A compressed matrix is adapted as one linear map,
y = module(x) + s B A x, in whatever form it is stored. Merging stores B A as a low-rank map beside it (`added` in the module and
in its layout): the stored form and factors shared with other matrices do not change, and neither do the logits. A factor can also
be adapted by its own name (`q_proj.left`), and merged if it belongs to one matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from wrapt import wrap_function_wrapper

from winnow.errors import InputError
from winnow.models.experts import Experts
from winnow.numerics.modules import CompressedLinear, Constant, RoundedEmbedding

OLDEST = "0.21"  # oldest peft version whose classes are extended here
STARTS = (True, False, "gaussian", "orthogonal")  # initialisations of adapters that do not need the dense weight


def supported() -> bool:
    """Whether the installed peft is new enough."""
    return Version(peft.__version__) >= Version(OLDEST)


class CompressedLora(Linear):
    """The adapters of one compressed matrix."""

    base_layer: CompressedLinear

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Raises InputError for options that need the dense weight."""
        options = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
        asked = [name for name, value in options.items() if value]
        if config.init_lora_weights not in STARTS:
            asked.append(f"init_lora_weights={config.init_lora_weights!r}")
        if asked:
            raise InputError(
                f"{kwargs.get('target_name')}: {asked[0]} needs a dense weight, but this matrix is compressed; remove it, or "
                "adapt the dense model that `python -m winnow export` writes"
            )
        self.name = kwargs.get("target_name", "")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError, with `safe_merge`, if an adapter is not finite, and InputError if the merged rank is larger than a
        layout allows."""
        module: Any = self.base_layer
        most = module.in_features + module.out_features
        for name in (name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A):
            a, b = (adapters[name].get_parameter("weight").detach() for adapters in (self.lora_A, self.lora_B))
            stored = module.weight  # empty, with the dtype and device of the module's tensors
            right, left = a.to(stored, copy=True), (b * self.scaling[name]).to(stored)
            if safe_merge and not all(torch.isfinite(factor).all() for factor in (right, left)):
                raise ValueError(f"the adapter {name} is not finite")
            if (rank := len(right) + (module.added.right.out_features if module.added else 0)) > most:
                raise InputError(f"{self.name}: with this adapter the merged rank is {rank}, more than {most}; do not merge it")
            module.add(right, left)
            module.added.requires_grad_(False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.base_layer.take_back(self.r[self.merged_adapters.pop()])


class CompressedLoraModel(LoraModel):
    """LoRA of models with compressed matrices; for other models the same as in peft."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Raises InputError for a compressed model with a peft that is too old."""
        self._maps = compressed_matrices(model)
        if self._maps and not supported():
            raise InputError(f"LoRA on a compressed model needs peft {OLDEST} or newer, this is {peft.__version__}: upgrade peft")
        config: Any = self.peft_config[adapter_name]
        if self._maps and str(config.target_modules).lower() == "all-linear":
            tuners_utils._maybe_include_all_linear_layers(config, model)
            config.target_modules = {n for n in config.target_modules if not self._maps & set(_above(n))} | self._maps
        self._constants = {name for name, module in model.named_modules() if isinstance(module, Constant)}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """A pattern that matches a compressed matrix and its factors selects the matrix; constants are not matrices."""
        matches = super()._check_target_module_exists
        found = matches(peft_config, key)
        if found and key in self._constants:
            warnings.warn(f"{key}: no adapter, since compression has merged this matrix into another of the layer", stacklevel=2)
            return False
        return found and not any(name in self._maps and matches(peft_config, name) for name in _above(key))

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(_stored(target), CompressedLinear) and kwargs.get("parameter_name") is None:
            return CompressedLora(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """Like in peft, but records merged adapters in the layouts, so that `save_pretrained` writes a checkpoint."""
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        layers = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "layers", {})
        for name, layout in layers.items():
            if added := getattr(model.get_submodule(name), "added", None):
                layers[name] = {**layout, "added": added.right.out_features}
        return model


def _stored(module: Any) -> nn.Module:
    """The module itself, without its adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _above(name: str) -> list[str]:
    """The names of all parent modules of a module."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def compressed_matrices(model: nn.Module) -> set[str]:
    """The names of the compressed matrices of a model, without those of their factors and without embeddings."""
    found: set[str] = set()
    for name, module in model.named_modules():
        own = _stored(module)
        if isinstance(own, CompressedLinear) and not isinstance(own, RoundedEmbedding) and not found & set(_above(name)):
            found.add(name)
    return found


def _check_factors(check: Callable[[], None], tuner: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Check before any merge of peft. Raises InputError for an adapter of a factor that other matrices share."""
    check(*args, **kwargs)
    users: dict[int, list[str]] = {}
    for name, parameter in tuner.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    matrices = compressed_matrices(tuner.model)
    for name, module in tuner.model.named_modules():
        own = sorted(matrices & set(_above(name)))
        if not own or not isinstance(module, BaseTunerLayer):
            continue
        others = [other for other in users.get(id(getattr(_stored(module), "weight", None)), []) if other != name]
        if others:
            raise InputError(
                f"{name}: {others[0]} shares this factor, and merging the adapter would change both; adapt the matrix "
                f"({own[0].rpartition('.')[2]!r} or 'all-linear' in `target_modules`), or do not merge the adapter"
            )


def _unless_apart(convert: Callable[..., Any], _: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """peft renames targets in experts to the fused parameter of transformers; here experts have separate matrices."""
    if any(isinstance(module, Experts) for module in kwargs["model"].modules()):
        return kwargs.get("adapter_state_dict")
    return convert(*args, **kwargs)


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = CompressedLoraModel
wrap_function_wrapper(tuners_utils, "BaseTuner._check_merge_allowed", _check_factors)
if supported():
    for of in ("config", "adapter_state_dict"):
        wrap_function_wrapper("peft.utils.transformers_weight_conversion", f"convert_peft_{of}_for_transformers", _unless_apart)
