"""Real models are read soundly. `WINNOW_REAL_MODELS=<folder> pytest tests/real`, after `python tests/real/fetch.py <folder>`.

`WINNOW_REAL_TEXT` names the text of WikiText-2's test split, where it is not beside the checkout.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import winnow
from tests.conftest import SHARED
from winnow.data.texts import read_rows
from winnow.models.retrieve import describe
from winnow.models.shape import shape_of
from winnow.planning.config import Text

FOLDER = os.environ.get("WINNOW_REAL_MODELS")
TEXT = Path(os.environ.get("WINNOW_REAL_TEXT", SHARED / "data" / "wt2raw-test.txt"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(FOLDER is None, reason="WINNOW_REAL_MODELS names no folder that tests/real/fetch.py wrote"),
]


def folder(name: str) -> Path:
    return Path(str(FOLDER)) / name


def text() -> str:
    if not TEXT.is_file():
        pytest.skip(f"{TEXT}: no such text; WINNOW_REAL_TEXT names one")
    preset = Text(files=[str(TEXT)], format="lines")
    return preset.join.join(read_rows(preset.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("name", "kind", "layers", "width", "vocabulary", "numbers"),
    [
        ("smollm2", "LlamaForCausalLM", 30, 576, 49_152, 134_515_008),
        ("gemma3", "Gemma3ForCausalLM", 18, 640, 262_144, 268_098_176),
        ("minilm", "BertModel", 6, 384, 30_522, 22_713_728),
    ],
)
def test_every_tensor_has_its_place(name, kind, layers, width, vocabulary, numbers):
    found, shape = describe(folder(name)), shape_of(folder(name))
    assert found["class"] == kind
    assert (shape.layers, shape.width, shape.vocabulary, shape.numbers) == (layers, width, vocabulary, numbers)


@pytest.mark.parametrize(("name", "layers"), [("smollm2", 30), ("gemma3", 18)])
def test_a_forecast_reads_the_header_of_the_file_as_it_reads_the_directory(name, layers):
    assert shape_of(folder(f"{name}.gguf")) == shape_of(folder(name))
    assert shape_of(folder(name)).layers == layers


def test_the_weights_are_those_that_transformers_loads_from_the_file():
    made = AutoModelForCausalLM.from_pretrained(folder("smollm2"), dtype=torch.bfloat16).state_dict()
    own = AutoModelForCausalLM.from_pretrained(folder("."), gguf_file="smollm2.gguf", dtype=torch.bfloat16).state_dict()
    assert made.keys() == own.keys()
    assert all(torch.equal(made[name], own[name]) for name in own)


# In float32 on the first 32 windows of the test split, its lines as rows, without a BOS but what the tokenizer adds.
@pytest.mark.parametrize(("name", "expected"), [("smollm2", 24.19)])
def test_perplexity_on_wikitext(name, expected):
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    found = winnow.evaluate(model, winnow.evaluation_windows(tokenizer, text(), 1024, 32))
    assert found["perplexity"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "said"), [("smollm2", "is Paris"), ("gemma3", "is the capital of")])
def test_what_is_generated_reads_as_english(name, said):
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert said in tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_sentence_that_everybody_knows_is_expected(name):
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    sentence = "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator"
    ids = tokenizer(f"{sentence} with certain unalienable Rights.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 1.5  # nats a token; 11 to 12 for a model that has learned nothing


def test_the_encoder_knows_which_sentences_are_alike():
    tokenizer, model = AutoTokenizer.from_pretrained(folder("minilm")), AutoModel.from_pretrained(folder("minilm"))
    lines = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates were raised by the central bank."]
    rows = tokenizer(lines, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**rows).last_hidden_state
    mask = rows["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    alike = means @ means.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
