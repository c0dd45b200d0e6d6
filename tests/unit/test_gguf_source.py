"""Models in GGUF files: what is read is the model that was written, and what cannot be is refused in one line."""

import json

import gguf
import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import winnow
from tests.conftest import ROOT
from tests.unit.gguf_files import write_gguf
from winnow.checkpoint.card import card
from winnow.commands import init
from winnow.data.tokens import encode, load_tokenizer
from winnow.errors import InputError
from winnow.models.gguf import GgufModel, dequantize_model, gguf_file
from winnow.models.retrieve import describe
from winnow.models.shape import shape_of
from winnow.planning.config import load
from winnow.planning.forecast import forecast
from winnow.planning.plan import Plan

WINDOWS = torch.randint(1, 1000, (4, 32), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(WINDOWS).logits


def read(file, folder, dtype=None):
    """(what gguf.json says, the model of the directory)"""
    folder.mkdir()
    facts = dequantize_model(file, folder, dtype)
    return facts, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_model_of_a_file_is_the_one_that_was_written(tmp_path, family):
    model = write_gguf(tmp_path / "a.gguf", family)
    facts, found = read(tmp_path / "a.gguf", tmp_path / "made")
    assert (facts["type"], facts["dtype"]) == ("F32", "float32")
    assert type(found) is type(model)
    assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    described = describe(tmp_path / "made")
    assert described["dequantized"] == facts == json.loads((tmp_path / "made" / "gguf.json").read_text())
    if family != "gemma2":  # whose tokenizer adds tokens that the demo's vocabulary lacks
        own, text = load_tokenizer(ROOT / "resources" / "models" / "demo"), "A number as 1234, and a word."
        assert encode(load_tokenizer(tmp_path / "made"), text, True).tolist() == encode(own, text, True).tolist()
    shape, whole = shape_of(tmp_path / "a.gguf"), shape_of(tmp_path / "made")
    assert shape == whole


@pytest.mark.parametrize(("kind", "dtype", "bits"), [("F16", "float16", 11), ("BF16", "bfloat16", 8), ("Q8_0", "bfloat16", 7)])
def test_the_dtype_is_that_of_the_file_unless_another_is_asked_for(tmp_path, kind, dtype, bits):
    model = write_gguf(tmp_path / "a.gguf", kind=kind)
    facts, found = read(tmp_path / "a.gguf", tmp_path / "made")
    assert (facts["type"], facts["dtype"], facts["types"]) == (kind, dtype, {"F32": 5, kind: 15})
    assert found.config.dtype == torch.float32  # of the call above
    for name, value in model.state_dict().items():
        assert (found.state_dict()[name] - value).abs().max() <= 2.0**-bits * value.abs().max(), name
    facts, found = read(tmp_path / "a.gguf", tmp_path / "other", "float32")
    stored = {t["dtype"] for t in describe(tmp_path / "other")["tensors"].values()}
    assert (facts["dtype"], stored) == ("float32", {"F32"})


def test_positions_scaled_as_those_of_llama_3_are_found_again(tmp_path):
    base = 10000.0 ** (-np.arange(0, 16, 2) / 16)  # the formula as published: long waves are slowed by the factor
    waves = 2 * np.pi / base
    smooth = np.clip((8192 / waves - 1) / (4 - 1), 0, 1)
    factors = 1 / ((1 - smooth) / 32 + smooth)
    write_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": factors.astype(np.float32)})
    _, found = read(tmp_path / "a.gguf", tmp_path / "made")
    assert found.config.rope_parameters["rope_type"] == "llama3"
    assert found.config.rope_parameters["factor"] == 32.0
    write_gguf(tmp_path / "b.gguf", tensors={"rope_freqs.weight": 1.5 * factors.astype(np.float32)})
    with pytest.raises(InputError, match=r"scaled by factors .rope_freqs. that are not those of a Llama 3 model"):
        read(tmp_path / "b.gguf", tmp_path / "other")


def test_digits_are_split_where_the_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda own, _: own.add_string("tokenizer.ggml.pre", "smollm"))
    write_gguf(tmp_path / "a.gguf")
    tokenizer = GgufModel(tmp_path / "a.gguf").tokenizer()
    assert [token.lstrip("Ġ") for token in tokenizer.tokenize("2024 20")] == ["2", "0", "2", "4", "", "2", "0"]


def write_text(path):
    path.write_text("not a model of any kind, but long enough to be read as one")


def cut(path, size):
    """The file without its end."""
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:size])


def of(*args, **changed):
    return lambda path: write_gguf(path, *args, **changed)


BIAS = {"blk.0.attn_q.bias": np.ones(64, np.float32)}
YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
REFUSED = {
    "text": (write_text, r"incomplete or not a GGUF file .*magic"),
    "cut": (lambda path: cut(path, -5000), "incomplete GGUF file"),
    "header": (lambda path: cut(path, 3000), "incomplete or not a GGUF file"),
    "architecture": (of(architecture="nobody"), "of the architecture 'nobody', which is not read from GGUF"),
    "experts": (of(**{"llama.expert_count": 8}), "a mixture of experts, which is not read from GGUF"),
    "split": (of(**{"split.count": 3}), "one of 3 parts of a model; join them with `llama-gguf-split"),
    "tokenizer": (of(tokenizer=False, **{"llama.vocab_size": 1024}), "has no tokenizer; use the original"),
    "tensor": (of(tensors=BIAS), r"attn_q.bias has no place in a LlamaForCausalLM"),
    "scaled": (of(**YARN), r"its positions are scaled .yarn, factor 4., which transformers does not read"),
    "scale": (of("gemma2", **{"gemma2.attention.key_length": 128}), "whose attention scale a GGUF file does not tell"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, what):
    make, line = REFUSED[what]
    make(tmp_path / "a.gguf")
    with pytest.raises(InputError, match=line) as refused:
        read(tmp_path / "a.gguf", tmp_path / "made")
    assert str(tmp_path / "a.gguf") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tensor_that_the_file_lacks_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", **{"llama.block_count": 3})  # a layer more than there is
    with pytest.raises(InputError, match=r"model.layers.2.* is missing from the weights"):
        (tmp_path / "made").mkdir()
        dequantize_model(tmp_path / "a.gguf", tmp_path / "made")
        describe(tmp_path / "made")


def test_the_file_of_a_source_is_found(tmp_path, saved_llama):
    write_gguf(tmp_path / "a.gguf")
    assert gguf_file(tmp_path) == gguf_file(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert gguf_file(saved_llama) is gguf_file(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match=r"b.gguf: there is no such file"):
        gguf_file(tmp_path / "b.gguf")
    (tmp_path / "B.GGUF").write_bytes(b"")
    with pytest.raises(InputError, match=r"contains 2 GGUF files .B.GGUF, a.gguf.; give one of them"):
        gguf_file(tmp_path)
    with pytest.raises(InputError, match=r"a part of a split model; join the parts with `llama-gguf-split --merge`"):
        part = tmp_path / "m-00001-of-00003.gguf"
        part.write_bytes(b"")
        gguf_file(part)


def test_a_file_is_compressed_in_memory_and_the_card_says_of_which_type_it_was(tmp_path):
    write_gguf(tmp_path / "mine.gguf", kind="Q8_0")
    made = winnow.compress(tmp_path / "mine.gguf", WINDOWS, "svd", 0.7, nearest=True)
    folder = made.save(tmp_path / "saved")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["dequantized"]["type"] == "Q8_0"
    row = next(line for line in card(recipe).splitlines() if line.startswith("| dense model"))
    assert row.startswith(
        "| dense model | dequantised once from Q8_0 (5 tensors F32, 15 tensors Q8_0) to bfloat16; GGUF file `mine.gguf`"
    )
    assert row in (folder / "README.md").read_text()
    assert load_tokenizer(folder).tokenize("of the")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_close(logits(loaded), logits(made.model), rtol=1e-2, atol=1e-2)


def test_init_and_plan_know_a_file_before_it_is_dequantised(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_gguf(tmp_path / "mine.gguf", kind="F16")
    said = init.init(str(tmp_path / "mine.gguf"), None, [], [], [0.5], ["svd"], tmp_path / "mine.yaml")
    assert "LlamaForCausalLM, 2 layers" in said[0]
    plan = Plan(load(yaml.safe_load((tmp_path / "mine.yaml").read_text())), ROOT)
    (name,) = plan.config.models
    works = {work.stage: work for work in forecast(plan, {name: shape_of(tmp_path / "mine.gguf")})}
    (tmp_path / "made").mkdir()
    dequantize_model(tmp_path / "mine.gguf", tmp_path / "made")
    assert works["dequantize"].disk == describe(tmp_path / "made")["bytes"]
    label = plan.labels["models"][name]
    assert list(plan.files("dequantize", {"model": label})) == [str(tmp_path / "mine.gguf")]
    assert plan.spec("retrieve_model", {"model": label}) == {"source": f"results/{label}/dequantized", "revision": None}
    assert plan.files("retrieve_model", {"model": label}) == {}


def test_a_stored_dtype_is_only_for_a_file(tmp_path):
    from winnow.planning.config_files import default

    config = default()
    config["models"]["demo"]["stored_dtype"] = "float16"
    with pytest.raises(InputError, match=r"models.demo.stored_dtype: is for the weights of a GGUF file; remove it"):
        Plan(load(config), ROOT).cells.check_sources()
