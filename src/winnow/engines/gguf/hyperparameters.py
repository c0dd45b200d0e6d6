"""The entries of a GGUF file that describe the model, from its config. An option that llama.cpp has no place for, or that it
would compute in another way, is refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, Keys
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from winnow.engines.gguf.families import BIASES, Family, head_width, key_value_heads
from winnow.errors import InputError

MAPPED = {  # entries of a config that are written, are given by the tensors, or are checked below
    *("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions"),
    *("original_max_position_embeddings", "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps"),
    *("layer_norm_eps", "layer_norm_epsilon", "rope_parameters", "tie_word_embeddings", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "layer_types", "query_pre_attn_scalar"),
}
HARMLESS = {"use_cache", "initializer_range", "pretraining_tp", "is_decoder"}  # they change no output
TRAINING = ("dropout", "pdrop", "token_id")  # ends of names, which change no output
LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of the model whose attention llama.cpp scales by hidden_size / heads


class Entries:
    """The entries of one model. Raises InputError, naming the key of the config, for what llama.cpp cannot compute."""

    def __init__(self, config: Any, family: Family, lengths: list[int], where: Any):
        """`lengths`: of the FFN of every layer. `where`: the file, for messages."""
        self.config, self.family, self.where, self.lengths = config, family, where, lengths
        self.varies = len(set(lengths)) > 1
        self.arch = family.varying if self.varies and family.varying else family.arch
        self._check()

    def refuse(self, key: str, why: str) -> None:
        value = getattr(self.config, key, None)
        raise InputError(f"{self.where}: {key}: {value!r} cannot be exported to gguf: {why}; use --format dense")

    def _check(self) -> None:
        config, defaults = self.config, type(self.config)().to_dict()
        known = MAPPED | HARMLESS | set(PretrainedConfig().to_dict()) | set(self.family.keys)
        known |= set(BIASES) if self.family.biases else set()
        for key, default in defaults.items():
            told = key in known or key.endswith(TRAINING) or key.startswith(("summary_", "_"))
            if not told and getattr(config, key, default) != default:
                self.refuse(key, f"llama.cpp only computes {default!r} for this family")
        names = ("hidden_act", "hidden_activation", "activation_function")
        name = next(name for name in names if getattr(config, name, None) is not None)
        if getattr(config, name) not in self.family.activations:
            self.refuse(name, f"llama.cpp only computes {' and '.join(self.family.activations)} for this family")
        wide = config.num_attention_heads * head_width(config)
        if self.family.arch in (MODEL_ARCH.QWEN2, MODEL_ARCH.PHI3) and wide != config.hidden_size:
            self.refuse("num_attention_heads", "llama.cpp needs heads that are together as wide as the hidden states")
        for key in self.family.keys:
            if key.endswith("softcapping") and self.family.arch == MODEL_ARCH.GEMMA2 and getattr(config, key) is None:
                self.refuse(key, "llama.cpp always limits the logits of this family")
        if self.family.pattern:
            self._check_gemma()

    def _check_gemma(self) -> None:
        config, pattern = self.config, self.family.pattern
        whole = [(layer + 1) % pattern == 0 for layer in range(config.num_hidden_layers)]
        if config.layer_types != ["full_attention" if every else "sliding_attention" for every in whole]:
            self.refuse("layer_types", f"llama.cpp has a layer without window after every {pattern - 1} layers with one")
        if not config.tie_word_embeddings and self.family.arch == MODEL_ARCH.GEMMA2:
            self.refuse("tie_word_embeddings", "llama.cpp has no output matrix for this family")
        largest = config.num_hidden_layers == LARGEST[config.model_type]
        scale = config.hidden_size // config.num_attention_heads if largest else head_width(config)
        if config.query_pre_attn_scalar != scale:
            self.refuse("query_pre_attn_scalar", f"llama.cpp computes with {scale} for this shape")

    def context(self) -> int:
        """The longest context: at most the window, in families for which llama.cpp has no window."""
        window = getattr(self.config, "sliding_window", None)
        limited = window is not None and not self.family.pattern
        return min(self.config.max_position_embeddings, window) if limited else self.config.max_position_embeddings

    def all(self) -> dict[str, Any]:
        """{key of the file: value}."""
        config, width = self.config, head_width(self.config)
        found: dict[str, Any] = {
            Keys.LLM.VOCAB_SIZE: config.vocab_size,
            Keys.LLM.CONTEXT_LENGTH: self.context(),
            Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
            Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
            Keys.LLM.FEED_FORWARD_LENGTH: self.lengths if self.varies else self.lengths[0],
            Keys.Attention.HEAD_COUNT: config.num_attention_heads,
            Keys.Attention.HEAD_COUNT_KV: key_value_heads(config),
            Keys.Attention.KEY_LENGTH: width,
            Keys.Attention.VALUE_LENGTH: width,
        }
        norms = {"rms_norm_eps": Keys.Attention.LAYERNORM_RMS_EPS, "layer_norm_epsilon": Keys.Attention.LAYERNORM_EPS}
        norms |= {"layer_norm_eps": Keys.Attention.LAYERNORM_EPS}
        optional = {
            **norms,
            "attn_logit_softcapping": Keys.LLM.ATTN_LOGIT_SOFTCAPPING,
            "final_logit_softcapping": Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
            "use_parallel_residual": Keys.LLM.USE_PARALLEL_RESIDUAL,
        }
        for name, key in optional.items():
            if (value := getattr(config, name, None)) is not None:
                found[key] = value if isinstance(value, bool) else float(value)
        if self.family.pattern:
            found[Keys.Attention.SLIDING_WINDOW] = config.sliding_window
        if getattr(config, "rope_parameters", None):
            found |= self._rope(width)
        return {key.format(arch=MODEL_ARCH_NAMES[self.arch]): value for key, value in found.items()}

    def rope_parameters(self) -> dict[str, Any]:
        """Those of layers without a window. Raises InputError for what llama.cpp does not have in this family."""
        given = self.config.rope_parameters
        whole, windowed = given.get("full_attention", given), given.get("sliding_attention", {})
        kinds = [whole.get("rope_type", "default"), windowed.get("rope_type", "default")]
        if kinds[0] not in self.family.rope_types or kinds[1] != "default":
            self.refuse("rope_parameters", f"llama.cpp has the types {', '.join(self.family.rope_types)} for this family")
        if (whole.get("partial_rotary_factor") or 1.0) != 1 and self.family.arch != MODEL_ARCH.GPTNEOX:
            self.refuse("rope_parameters", "llama.cpp rotates whole heads in this family")
        return whole

    def _rope(self, width: int) -> dict[str, Any]:
        whole = self.rope_parameters()
        found: dict[str, Any] = {Keys.Rope.FREQ_BASE: float(whole["rope_theta"])}
        found[Keys.Rope.DIMENSION_COUNT] = int(width * (whole.get("partial_rotary_factor") or 1.0))
        if windowed := self.config.rope_parameters.get("sliding_attention"):
            found[Keys.Rope.FREQ_BASE_SWA] = float(windowed["rope_theta"])
        if whole.get("rope_type") == "linear":
            found |= {Keys.Rope.SCALING_TYPE: "linear", Keys.Rope.SCALING_FACTOR: float(whole["factor"])}
        return found

    def frequency_factors(self) -> Tensor | None:
        """Divisors of the rotary frequencies (float32), for the scaling of Llama 3; None without it."""
        if not getattr(self.config, "rope_parameters", None) or self.rope_parameters().get("rope_type") != "llama3":
            return None
        scaled, factor = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        if not math.isclose(factor, 1):
            self.refuse("rope_parameters", "llama.cpp does not scale attention for this type")
        width = head_width(self.config)
        plain = self.rope_parameters()["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        return (plain / scaled.double()).float()
