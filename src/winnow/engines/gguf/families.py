"""The families of which llama.cpp computes what transformers does, each with what is particular to it. Each was compared with
transformers on a random model (`tests/engines/test_llama_cpp.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH as ARCH
from torch import Tensor

from winnow.errors import InputError


@dataclass(frozen=True)
class Family:
    """How llama.cpp names and computes a family.

    `varying`: the architecture of the same graph that reads a length of the FFN for every layer. `rope_types`: scalings of the
    rotary frequencies. `keys`: entries of the config that other families must leave at their default. `biases`: every matrix may
    have a bias. `shift`: what is added to the weights of norms. `output`: the file has an output matrix even if it is tied.
    `pattern`: every so many layers one attends to all tokens, the others to a window; 0: all layers to all tokens."""

    arch: ARCH
    activations: tuple[str, ...] = ("silu",)
    varying: ARCH | None = None
    rope_types: tuple[str, ...] = ("default",)
    keys: tuple[str, ...] = ()
    biases: bool = False
    shift: float = 0.0
    output: bool = False
    pattern: int = 0


GELU = ("gelu_pytorch_tanh", "gelu_new")  # llama.cpp looks values up in a table of float16
FAMILIES = {
    "llama": Family(ARCH.LLAMA, varying=ARCH.DECI, biases=True, rope_types=("default", "linear", "llama3")),
    "mistral": Family(ARCH.LLAMA, varying=ARCH.DECI, biases=True),
    "qwen2": Family(ARCH.QWEN2),
    "qwen3": Family(ARCH.QWEN3),
    "gemma2": Family(ARCH.GEMMA2, GELU, keys=("attn_logit_softcapping", "final_logit_softcapping"), shift=1.0, pattern=2),
    "gemma3_text": Family(
        ARCH.GEMMA3, GELU, keys=("final_logit_softcapping",), shift=1.0, pattern=6, rope_types=("default", "linear")
    ),
    "phi3": Family(ARCH.PHI3),
    "gpt2": Family(ARCH.GPT2, GELU),
    # llama.cpp computes the approximation of GELU by tanh also where the model has the exact one.
    "gpt_neox": Family(ARCH.GPTNEOX, (*GELU, "gelu"), keys=("use_parallel_residual",), output=True),
}
BIASES = ("attention_bias", "mlp_bias")  # keys of the config


def family_of(model_type: str, where: Any) -> Family:
    """The family of a model type. Raises InputError, naming those that there are, for another one; `where` is the file."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{where}: model type {model_type!r} cannot be exported to gguf (only {known}); use --format dense")
    return FAMILIES[model_type]


def head_width(config: Any) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: Any) -> int:
    """Heads of the keys and of the values."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def row_order(config: Any, role: str, rows: int) -> Tensor | None:
    """The order in which llama.cpp has the outputs of a matrix (`rows` of them); None: as in the model.

    It rotates neighbouring channels of Llama's queries and keys, where transformers rotates channel i of a head together with
    channel i + width / 2; NeoX's matrix has query, key and value of each head in turn, and llama.cpp all queries first."""
    heads, order = config.num_attention_heads, torch.arange(rows)
    if FAMILIES[config.model_type].arch == ARCH.LLAMA and role in ("q_proj", "k_proj"):
        return order.view(heads if role == "q_proj" else key_value_heads(config), 2, -1).mT.flatten()
    if config.model_type == "gpt_neox" and role == "qkv_proj":
        return order.view(heads, 3, -1).transpose(0, 1).flatten()
    return None


def padded_rows(role: str, rows: int, width: int) -> Tensor:
    """The rows of a matrix into the FFN with outputs for `width` neurons instead of those that it has; -1 for a row of zeros.

    `gate_up_proj` has the rows of the gate above those of up."""
    parts = torch.arange(rows).chunk(2 if role == "gate_up_proj" else 1)
    return torch.cat([part for own in parts for part in (own, own.new_full((width - len(own),), -1))])
