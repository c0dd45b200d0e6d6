"""Small random models, made here; no network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library

import pytest
import torch
from hypothesis import settings
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

torch.set_num_threads(1)  # tests run side by side, on small matrices
# The same examples in every run: a change is judged by the change. `--hypothesis-profile default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
VOCABULARY = 1024  # that of the demo tokenizer, which tests borrow


def pico(family: str, seed: int = 0):
    """A random model of two layers; weights large enough that layers matter."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if family == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
        config = LlamaConfig(hidden_size=64, intermediate_size=96, tie_word_embeddings=True, **heads, **common)
        return LlamaForCausalLM(config).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)).eval()
    if family == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        return OPTForCausalLM(OPTConfig(max_position_embeddings=64, pad_token_id=1, **sizes, **common)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "bert":
        return BertLMHeadModel(BertConfig(max_position_embeddings=64, is_decoder=True, **sizes, **common)).eval()
    return GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=64, **sizes, **common)).eval()


FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "bert")


@pytest.fixture(scope="session", params=FAMILIES)
def saved_model(request, tmp_path_factory) -> Path:
    """A directory with a random model of each family in turn."""
    folder = tmp_path_factory.mktemp("models") / f"some {request.param} folder"
    pico(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    pico("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
