"""Small random models, made here; no network."""

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library
os.environ["WINNOW_SAVE_SECONDS"] = "0"  # every job saves what it has reached, which otherwise only long ones do

import pytest
import torch
import transformers
from hypothesis import settings

from winnow.planning.config_files import default

torch.set_num_threads(1)  # tests run side by side, on small matrices
# The same examples in every run: a change is judged by the change. `--hypothesis-profile default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
VOCABULARY = 1024  # that of the demo tokenizer, which tests borrow


COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
PLAIN = {"hidden_size": 32, "intermediate_size": 64, **LAYERS, **COMMON}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LLAMA = {**COMMON, **LAYERS, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}
GEMMA = {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8}
MIXTURE = {"num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
IMAGES = {"vision_config": {**VISION, "patch_size": 14}, "mm_tokens_per_image": 4}
MARKS = {f"{name}_token_index": i for i, name in enumerate(("image", "boi", "eoi"), start=2)}

# {name: (transformers class, config options)}: a random model of two layers each, and of every head that a family is used with.
TINY: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", {**PLAIN, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForConditionalGeneration", {"text_config": GEMMA, **IMAGES, **MARKS}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**GROUPED, **MIXTURE, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, **MIXTURE, "num_local_experts": 4, "intermediate_size": 32}),
    "phi3": ("Phi3ForCausalLM", {**PLAIN, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", {**COMMON, **GPT2}),
    "opt": ("OPTForCausalLM", {**PLAIN, **OPT}),
    "gpt_neox": ("GPTNeoXForCausalLM", PLAIN),
    "bert": ("BertLMHeadModel", {**PLAIN, "is_decoder": True}),
    "bert_masked": ("BertForMaskedLM", PLAIN),
    "bert_classifier": ("BertForSequenceClassification", {**PLAIN, "num_labels": 3}),
    "bert_encoder": ("BertModel", PLAIN),
    "roberta": ("RobertaForCausalLM", {**PLAIN, "is_decoder": True, "pad_token_id": 1}),
    "roberta_masked": ("RobertaForMaskedLM", {**PLAIN, "pad_token_id": 1}),
    "roberta_classifier": ("RobertaForSequenceClassification", {**PLAIN, "pad_token_id": 1}),
}


def pico(name: str, seed: int = 0):
    """A random model of two layers (see `TINY`); weights large enough that layers matter."""
    torch.manual_seed(seed)
    class_name, options = TINY[name]
    cls = getattr(transformers, class_name)
    return cls(cls.config_class(**options)).eval()


FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "bert")  # one of every form, for tests of every structure


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """From a name in `TINY` to a directory with that random model, the same for all tests: none may write into it."""

    @cache
    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / f"some {name} folder"
        pico(name).save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session", params=FAMILIES)
def saved_model(request, saved) -> Path:
    """A directory with a random model of each family in turn."""
    return saved(request.param)


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    pico("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def pytest_collection_modifyitems(items):
    """Whole workflows first, and small tests after them: side by side, the workers then end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


def pytest_terminal_summary(terminalreporter):
    """The rows that tests record under `architecture`, as a table."""
    reports = terminalreporter.stats.get("passed", [])
    rows = [value for report in reports for key, value in report.user_properties if key == "architecture"]
    if rows:
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        terminalreporter.section("architectures at full rank, against the dense model")
        for line in table:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def plain() -> dict:
    """The default configuration, with the four metrics of two factors at eight budgets as its experiment."""
    config = copy.deepcopy(default())
    budgets = [f"{name}-{keep}" for name in ("ffn", "all") for keep in (0.9, 0.8, 0.6, 0.4)]
    config["experiments"]["demo"] |= {"methods": ["svd", "weight_norm", "asvd", "whitened"], "budgets": budgets}
    return config
