"""Exports to GGUF, loaded by llama.cpp itself: logits of random models of every family, tokens, and the loss of checkpoints of
trained models beside llama.cpp's own rounding of the dense model.

The environment takes minutes to build; `WINNOW_LLAMA_CPP_PYTHON` names the interpreter of one that is there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.conftest import ROOT, SHARED, TINY
from tests.engines.llama import LlamaCpp, environment
from winnow.api import calibration_windows, compress, evaluate, evaluation_windows
from winnow.checkpoint.loading import load_model
from winnow.data.tokens import load_tokenizer
from winnow.engines.gguf.export import export_gguf
from winnow.engines.gguf.families import FAMILIES
from winnow.engines.gguf.tokenizer import CUTS, REPLACED, SPACE
from winnow.engines.speed import uncompressed

pytestmark = pytest.mark.slow
TOKENIZER = next((ROOT / "resources").rglob("tokenizer.json"))
SENTENCEPIECE = "default"  # what llama.cpp calls it
EXACT = {"type_k": 0, "type_v": 0}  # keys and values in float32
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
WINDOWED = {"rope_type": "default", "rope_theta": 100.0}
VARIANTS = [  # family, and options of its config beside those of `TINY`
    *((name, {}) for name in FAMILIES if not name.startswith(("gemma", "mistral"))),
    ("mistral", {"sliding_window": None}),
    ("gemma2", {"num_hidden_layers": 4}),
    ("gemma3_text", {"num_hidden_layers": 7}),
    ("gemma3_text", {"num_hidden_layers": 7, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": WINDOWED}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "head_dim": 8}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, **LLAMA_3}}),
    ("llama", {"rope_parameters": LINEAR}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"}),
]
MIXED = {
    "structure": {
        "kind": "mixed",
        "members": [{"kind": "neuron_slice", "criterion": "loss"}, {"kind": "rounded", "bits": [8]}],
    },
    "metric": {"kind": "two_sided"},
    "allocation": {"kind": "ilp"},
}
METHODS: dict[str, tuple] = {"rounded": ("rounded_two_sided", 0.3), "smaller": (MIXED, 0.45), "low rank": ("whitened", 0.6)}
TEXTS = [
    "Once upon a time, there was a girl named Lily.  She'd 12 apples and 3456 pears!\n\n\tWe'll see -- they're (not) ours...",
    "Ünïcode: 你好, мир — naïve café 🦙🦙; x_1 = f(2.5e-3) # comment\r\n   indented\n",
    " leading and trailing  ",
]


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory) -> LlamaCpp:
    return LlamaCpp(environment(tmp_path_factory.mktemp("llama.cpp") / "venv"), tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_logits_are_those_of_transformers(family, options, llama_cpp, tmp_path):
    """Of models with sharp attention, in float32, for more tokens than a window."""
    torch.manual_seed(1)
    name, given = TINY[family]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**given, "initializer_range": 0.25, **options})
    model = model_class(config).eval()
    for key, tensor in model.named_parameters():
        if tensor.ndim == 1:  # norms and biases, which are 1 and 0 in new models
            torch.nn.init.normal_(tensor, 0.0 if "bias" in key or "gemma" in family else 1.0, 0.3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    export_gguf(uncompressed(tmp_path / "model", tmp_path / "dense"), tmp_path / "out", None)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 48))
    found = llama_cpp.measure(tmp_path / "out" / "model.gguf", ids, "logits", options=EXACT)["logits"]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)).logits[0]
    assert logits.std() > 0.5, "layers matter"
    near, own = torch.from_numpy(found).log_softmax(-1), logits.log_softmax(-1)
    # GELU is looked up in a table of float16, and that of NeoX is an approximation.
    limit = 0.02 if family.startswith(("gemma", "gpt")) else 2e-4
    assert (near - own).abs().max() < limit


def trained(kind: str) -> Tokenizer:
    """BPE from the text of this project: on bytes with the pre-tokenizer that llama.cpp calls so, or as SentencePiece."""
    own = Tokenizer(models.BPE(byte_fallback=kind == SENTENCEPIECE, ignore_merges=kind == "llama-bpe", unk_token="<unk>"))
    content = json.loads(own.to_str())
    if kind == SENTENCEPIECE:
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACED]}
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        content["model"]["unk_token"] = None
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"trim_offsets": True, **cut} for cut in CUTS[kind]]}
        special = ["<|endoftext|>"]
    own = Tokenizer.from_str(json.dumps(content))
    alphabet = [] if kind == SENTENCEPIECE else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    own.train([str(ROOT / "README.md"), str(ROOT / "CHANGELOG.md")], trainer)
    if kind != SENTENCEPIECE:
        return own
    content = json.loads(own.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["merges"] = [
        [token[:at], token[at:]]
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        for at in range(1, len(token))
        if token not in special and token[:at] in vocabulary and token[at:] in vocabulary
    ]
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no special tokens
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("kind", [*CUTS, SENTENCEPIECE])
def test_tokens_are_those_of_tokenizers(kind, llama_cpp, saved_llama, tmp_path):
    model, own = uncompressed(saved_llama, tmp_path / "model"), trained(kind)
    own.save(str(model / "tokenizer.json"))
    export_gguf(model, tmp_path / "out", None)
    file = tmp_path / "out" / "model.gguf"
    assert GGUFReader(file).get_field("tokenizer.ggml.pre").contents() == kind
    texts = [*TEXTS, (ROOT / "README.md").read_text(encoding="utf-8")[:3000]]
    found = llama_cpp.measure(file, np.zeros((1, 2), np.int64), "tokens", texts=texts)
    for i, text in enumerate(texts):
        assert found[f"text{i}"].tolist() == own.encode(text).ids, text


def losses(model: Path, windows: torch.Tensor) -> np.ndarray:
    """(windows,) nats per token, in float32."""
    rows = evaluate(load_model(model, "float32", "cpu"), windows)["per_window"]
    return np.array(rows["nll"]) / (windows.shape[1] - 1)


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="no shared models beside the checkout")
@pytest.mark.parametrize("name", ["wt2-llama", "wt2-gpt2", "wt2-neox"])
def test_the_loss_is_that_of_the_checkpoint(name, llama_cpp, tmp_path):
    """Nearer than that of the Q8_0 that llama.cpp makes of the dense model is to the dense model's, by window and on average."""
    model, data = SHARED / "models" / name, SHARED / "data"
    tokenizer = load_tokenizer(model)
    calibration = calibration_windows(tokenizer, (data / "wt2raw-train-excerpt.txt").read_text(encoding="utf-8"), 32, 256)
    windows = evaluation_windows(tokenizer, (data / "wt2raw-test.txt").read_text(encoding="utf-8"), 256, 64)

    def above(file: Path, checkpoint: Path) -> np.ndarray:
        found = llama_cpp.measure(file, windows.numpy(), "losses")["losses"]
        return found / (windows.shape[1] - 1) - losses(checkpoint, windows)

    export_gguf(uncompressed(model, tmp_path / "dense"), tmp_path / "dense gguf", None)
    file = llama_cpp.quantized(tmp_path / "dense gguf" / "model.gguf", tmp_path / "q8_0.gguf")
    own = above(file, model)
    typical, standard = np.sqrt(np.mean(own**2)), np.std(own, ddof=1) / 8
    for method, (preset, keep) in METHODS.items():
        made = compress(model, calibration, preset, keep, nearest=True)
        checkpoint = made.save(tmp_path / method)
        export_gguf(checkpoint, tmp_path / f"{method} gguf", None)
        file = tmp_path / f"{method} gguf" / "model.gguf"
        if method == "smaller" and name == "wt2-llama":
            assert len(set(GGUFReader(file).get_field("deci.feed_forward_length").contents())) > 1
        found = above(file, checkpoint)
        assert np.sqrt(np.mean(found**2)) < typical, (method, found, own)
        assert abs(found.mean()) < abs(own.mean()) + 2 * standard, (method, found.mean(), own.mean())
