"""GGUF files of random models, written as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from tests.conftest import GEMMA, ROOT, pico

TOKENIZER = ROOT / "resources" / "models" / "demo" / "tokenizer.json"
NAMES = {
    "llama": {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{m}_proj": f"attn_{m}" for m in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{m}_proj": f"ffn_{m}" for m in ("gate", "up", "down")},
    },
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}
NAMES["gemma2"] = NAMES["llama"] | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def stored_name(family: str, name: str) -> str:
    module, _, part = name.rpartition(".")
    for start in ("model.layers.", "transformer.h."):
        if module.startswith(start):
            layer, _, module = module.removeprefix(start).partition(".")
            return f"blk.{layer}.{NAMES[family][module]}.{part}"
    return f"{NAMES[family][module]}.{part}"


def stored_values(family: str, name: str, value: torch.Tensor, heads: dict[str, int]) -> np.ndarray:
    """As llama.cpp's converter changes them: it pairs rotated channels otherwise, adds 1 to Gemma's norms, turns GPT-2's."""
    own = value.float().numpy()
    if family == "llama" and (role := name.split(".")[-2]) in heads:
        return own.reshape(heads[role], 2, -1, own.shape[1]).swapaxes(1, 2).reshape(own.shape)
    if family == "gemma2" and "norm" in name:
        return own + 1
    return own.T.copy() if family == "gpt2" and own.ndim == 2 and ".h." in name else own


def metadata_of(family: str, config) -> dict[str, object]:
    if family == "gpt2":
        names = {"block_count": "n_layer", "context_length": "n_positions", "embedding_length": "n_embd"}
        return {**{k: getattr(config, v) for k, v in names.items()}, "attention.head_count": config.n_head,
                "feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": config.layer_norm_epsilon}  # fmt: skip
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return found | (
        {"rope.dimension_count": config.head_dim}
        if family == "llama"
        else {"attention.sliding_window": 16, "attention.key_length": 256}
    )


def of_256_channels(seed: int):
    """A random Gemma 2 with heads of 256 channels: a file cannot tell the attention scale of others."""
    torch.manual_seed(seed)
    config = transformers.Gemma2Config(**{**GEMMA, "head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2})
    return transformers.Gemma2ForCausalLM(config).eval()


def write_gguf(path: Path, family: str = "llama", kind: str = "F32", seed: int = 0, tokenizer: bool = True, **changed):
    """Write a random model as a GGUF file whose matrices are of one type; returns the model. `changed`: entries of the metadata
    (None leaves one out); `architecture`; more `tensors`."""
    model = pico(family, seed) if family != "gemma2" else of_256_channels(seed)
    more = changed.pop("tensors", {})
    writer = gguf.GGUFWriter(path, changed.pop("architecture", family))
    own = {f"{family}.{key}": value for key, value in metadata_of(family, model.config).items()}
    own |= {"general.file_type": int(gguf.LlamaFileType[f"ALL_{kind}" if kind == "F32" else f"MOSTLY_{kind}"])} | changed
    for key, value in own.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key, value)
    if tokenizer:
        add_tokenizer(writer)
    heads = {}
    if family == "llama":
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    of_kind = gguf.GGMLQuantizationType[kind]
    values = {n: v for n, v in model.state_dict().items() if n not in model.all_tied_weights_keys}
    for name, value in values.items():
        data = stored_values(family, name, value, heads)
        if data.ndim == 1:
            writer.add_tensor(stored_name(family, name), data)
        else:
            writer.add_tensor(stored_name(family, name), gguf.quantize(data, of_kind), raw_dtype=of_kind)
    for name, data in more.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The demo's tokenizer, as the GPT-2 kind of llama.cpp."""
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i == 0 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
