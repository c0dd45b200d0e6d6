"""Whatever transformers loads whole is read, under its own rules: ties of either side, keys that a class ignores, other heads."""

import copy
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForPreTraining, RobertaForMaskedLM

from tests.conftest import TINY, pico
from tests.unit.test_checkpoint import IDS, build, logits
from winnow.checkpoint.export import export_dense
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed
from winnow.errors import InputError
from winnow.evaluation.perplexity import evaluate, evaluate_by_block
from winnow.io.artifacts import write_json
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe

TIED = {"llama": "model.embed_tokens", "opt": "model.decoder.embed_tokens", "gpt2": "transformer.wte"}
HEADS = {"bert_masked": ("bert.embeddings.word_embeddings", "cls.predictions.decoder")}
HEADS |= {"roberta_masked": ("roberta.embeddings.word_embeddings", "lm_head.decoder")}
HEADS |= {name: (embedding, "lm_head") for name, embedding in TIED.items()}


def rewritten(folder, change):
    """The weights of a directory changed, and the dictionary of them handed back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def head_only(embedding, head):
    return lambda tensors: tensors.update({f"{head}.weight": tensors.pop(f"{embedding}.weight")})


def loaded(folder):
    with torch.no_grad():
        return load_model(folder, "float32", "cpu")(input_ids=IDS).logits


@pytest.mark.parametrize("name", HEADS)
def test_a_tied_model_that_stores_its_head_alone(tmp_path, name):
    """The manifest is that of the same model with its embeddings stored, but for the key in the file."""
    embedding, head = HEADS[name]
    pico(name).save_pretrained(tmp_path / "model")
    usual, expected = describe(tmp_path / "model"), loaded(tmp_path / "model")
    rewritten(tmp_path / "model", head_only(embedding, head))
    facts = describe(tmp_path / "model")
    assert facts["tensors"][f"{embedding}.weight"]["key"] == f"{head}.weight"
    want = copy.deepcopy(usual)
    want["tensors"][f"{embedding}.weight"]["key"] = f"{head}.weight"
    assert {**facts, "files": {}} == {**want, "files": {}}
    write_json(tmp_path / "model.json", facts)
    model = load_model(tmp_path / "model", "float32", "cpu")
    assert torch.equal(ModelFiles(tmp_path / "model.json").tensor(f"{embedding}.weight"), model.get_input_embeddings().weight)
    assert torch.equal(loaded(tmp_path / "model"), expected)


@pytest.mark.parametrize("name", TIED)
def test_it_is_streamed_compressed_and_exported_as_any(tmp_path, name):
    source = tmp_path / "model"
    pico(name).save_pretrained(source)
    usual = build(source, tmp_path / "usual", ["ffn", "attention"], 0.6)
    rewritten(shutil.copytree(source, tmp_path / "other" / "model"), head_only(TIED[name], "lm_head"))
    source = tmp_path / "other" / "model"
    windows, first = torch.arange(40).reshape(4, 10), torch.ones(4, dtype=torch.int64)
    want = evaluate(load_model(source, "float32", "cpu"), None, windows, first, 2)
    streamed = Streamed(source, "float32", "cpu", tmp_path / "artefact", 10)
    assert evaluate_by_block(streamed, None, windows, first, 2)["nll"] == pytest.approx(want["nll"], rel=1e-6)
    checkpoint = build(source, tmp_path / "work", ["ffn", "attention"], 0.6)
    assert {p.name for p in checkpoint.iterdir()} == {p.name for p in usual.iterdir()}
    assert (checkpoint / "model.safetensors").read_bytes() == (usual / "model.safetensors").read_bytes()
    export_dense(checkpoint, tmp_path / "dense", {})
    found = logits(load_model(checkpoint, "float32", "cpu"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()), found, atol=1e-5, rtol=0)


def test_a_checkpoint_that_stores_its_head_alone_loads(tmp_path, saved_llama):
    checkpoint = build(saved_llama, tmp_path / "work", ["ffn"], 0.6)
    expected = loaded(checkpoint)
    rewritten(checkpoint, head_only(TIED["llama"], "lm_head"))
    assert torch.equal(loaded(checkpoint), expected)


def old_bert(folder, name="bert_masked"):
    """BERT as the hub has it: with a pooler, all heads of its training, and buffers that are not stored any more."""
    cls, options = TINY[name]
    torch.manual_seed(0)
    BertForPreTraining(BertConfig(**options)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [cls]}))
    with_buffers(folder, "bert")


def with_buffers(folder, prefix):
    buffers = {f"{prefix}.embeddings.{name}": torch.arange(64)[None] for name in ("position_ids", "token_type_ids")}
    rewritten(folder, lambda tensors: tensors.update(buffers))


@pytest.mark.parametrize("name", ["bert_masked", "bert"])
def test_bert_as_the_hub_has_it(tmp_path, caplog, name):
    old_bert(tmp_path / "model", name)
    with caplog.at_level(logging.INFO, logger="winnow"):
        facts = describe(tmp_path / "model")
    unused = "bert.embeddings.position_ids, bert.embeddings.token_type_ids, bert.pooler.dense.bias, bert.pooler.dense.weight, "
    unused += "cls.seq_relationship.bias, cls.seq_relationship.weight"
    assert caplog.messages == [f"not used by {facts['class']}: {unused}"]
    model, report = type(pico(name)).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert set(facts["tensors"]) | set(facts["tied"]) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "model"), model.eval()(input_ids=IDS).logits)


def test_roberta_and_its_encoder_as_the_hub_has_them(tmp_path):
    """With position ids, and for a classifier with the head of its first training beside its own."""
    pico("roberta_masked").save_pretrained(tmp_path / "model")
    usual = describe(tmp_path / "model")["tensors"]
    with_buffers(tmp_path / "model", "roberta")
    assert describe(tmp_path / "model")["tensors"] == usual
    pico("roberta_classifier").save_pretrained(tmp_path / "classifier")
    usual = describe(tmp_path / "classifier")["tensors"]
    heads = {k: t.clone() for k, t in RobertaForMaskedLM(pico("roberta_masked").config).state_dict().items() if "lm_head" in k}
    rewritten(tmp_path / "classifier", lambda tensors: tensors.update(heads))
    assert describe(tmp_path / "classifier")["tensors"] == usual
    assert loaded(tmp_path / "classifier").shape == (2, 2)


def test_buffers_of_old_decoders_are_passed_over(tmp_path):
    for name, prefix, buffers in (
        ("gpt2", "transformer.h.0.attn.", ("bias", "masked_bias")),
        ("gpt_neox", "gpt_neox.layers.0.attention.", ("bias", "masked_bias", "rotary_emb.inv_freq")),
        ("llama", "model.layers.0.self_attn.", ("rotary_emb.inv_freq",)),
    ):
        pico(name).save_pretrained(tmp_path / name)
        usual = describe(tmp_path / name)["tensors"]
        rewritten(tmp_path / name, lambda t, p=prefix, b=buffers: t.update({f"{p}{key}": torch.ones(1) for key in b}))
        assert describe(tmp_path / name)["tensors"] == usual


LAYER = "model.layers.{}.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "unexpected"),
    [
        (lambda t: t.update({f"{LAYER.format(2)}.weight": torch.ones(96, 64)}), f"{LAYER.format(2)}.weight"),
        (lambda t: t.update({f"{LAYER.format(1)}.lora_A.weight": torch.ones(4, 64)}), f"{LAYER.format(1)}.lora_A.weight"),
        (lambda t: t.update({f"{LAYER.format(1)}.weight_scale": torch.ones(96)}), f"{LAYER.format(1)}.weight_scale"),
        (lambda t: t.update({"layers.7.mlp.up_proj.weight": torch.ones(96, 64)}), "layers.7.mlp.up_proj.weight"),
        (lambda t: t.update({"model.embed_norm.weight": torch.ones(64)}), "model.embed_norm.weight"),
        (lambda t: t.update({"lm_head.bias": torch.ones(1024)}), "lm_head.bias"),
        (lambda t: t.update({"lm_head.lora_A.weight": torch.ones(4, 64)}), "lm_head.lora_A.weight"),
    ],
)
def test_what_the_model_would_compute_with_is_not_passed_over(saved_llama, tmp_path, change, unexpected):
    """More layers than the config has, factors of an adapter, scales of quantised weights, a norm or a bias of another model."""
    rewritten(shutil.copytree(saved_llama, tmp_path / "model"), change)
    with pytest.raises(
        InputError, match=rf"model\.safetensors: unexpected tensor {unexpected}: LlamaForCausalLM has no such tensor"
    ):
        describe(tmp_path / "model")


def test_heads_of_other_training_are_passed_over_and_named(saved_llama, tmp_path, caplog):
    others = {"v_head.summary.weight": torch.ones(1, 64), "score.weight": torch.ones(2, 64)}
    rewritten(shutil.copytree(saved_llama, tmp_path / "model"), lambda tensors: tensors.update(others))
    with caplog.at_level(logging.INFO, logger="winnow"):
        assert describe(tmp_path / "model")["tensors"] == describe(saved_llama)["tensors"]
    assert caplog.messages == ["not used by LlamaForCausalLM: score.weight, v_head.summary.weight"]


@pytest.mark.parametrize("keep", [0, 5])
def test_a_foreign_or_cut_off_set_of_tensors_is_refused(saved_llama, tmp_path, keep):
    def change(tensors):
        for name in sorted(tensors)[keep:]:
            tensors[f"other.{name}"] = tensors.pop(name)

    rewritten(shutil.copytree(saved_llama, tmp_path / "model"), change)
    with pytest.raises(InputError, match=r"model: the tensor model\..* is missing from the weights \(\d+ of 21 are\)"):
        describe(tmp_path / "model")
