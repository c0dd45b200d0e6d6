"""Keys of config.json that make `from_pretrained` compute something else than the tensors say: refused however it is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, pico
from tests.unit.test_checkpoint import build
from winnow.checkpoint.export import Checkpoint, export_dense
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed
from winnow.data.tokens import load_tokenizer
from winnow.errors import InputError
from winnow.models.retrieve import describe, model_digests
from winnow.models.shape import shape_of
from winnow.training.finetune import load_base

DEMO = ROOT / "resources" / "models" / "demo"
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
METHODS = ["gptq", "awq", "torchao", "quanto", "hqq", "compressed-tensors", "bitsandbytes", "nonesuch"]
WAYS = {
    "describe": describe,
    "files_of": model_digests,  # of a model that is tuned first
    "shape_of": shape_of,  # of `snakemake plan`
    "load_model": lambda folder: load_model(folder, "float32", "cpu"),
    "Streamed": lambda folder: Streamed(folder, "float32", "cpu", folder / "artefact", 8),
    "load_base": lambda folder: load_base(folder, ["a", "b"], load_tokenizer(DEMO), 0, "cpu"),
    "load_tokenizer": load_tokenizer,
}


def with_keys(source, folder, part=None, **keys):
    """A copy of a directory with keys of its config.json, or of a part of that, set."""
    shutil.copytree(source, folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return edited(folder, lambda config: (config[part] if part else config).update(keys))


def edited(folder, change):
    """The directory, its config.json changed."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_quantisation_left_behind_is_refused_by_every_way_of_loading(saved_llama, tmp_path, way):
    folder = with_keys(saved_llama, tmp_path / "model", quantization_config=ONLINE)
    with pytest.raises(InputError) as caught:
        WAYS[way](folder)
    assert str(caught.value) == (
        f"{folder}/config.json: quantization_config asks for bitnet, but the weights are not quantised: transformers would load "
        "another model than the one that is compressed; delete the key, which tools leave when they merge to 16 "
        "bits"
    )
    WAYS[way](edited(folder, lambda config: config.pop("quantization_config")))  # which is the cure


@pytest.mark.parametrize("value", [*({"quant_method": method, "bits": 4} for method in METHODS), {}, {"bits": 4}])
def test_every_method_is_refused_where_the_model_is_retrieved(saved_llama, tmp_path, value):
    method = value.get("quant_method", "an unnamed method")
    with pytest.raises(InputError, match=rf"config\.json: quantization_config asks for {method}, but .* not quantised"):
        describe(with_keys(saved_llama, tmp_path / "model", quantization_config=value))
    assert describe(with_keys(saved_llama, tmp_path / "none", quantization_config=None))["tensors"]


def test_one_in_a_part_of_the_config_is_found(tmp_path):
    pico("gemma3").save_pretrained(tmp_path / "source")
    folder = with_keys(tmp_path / "source", tmp_path / "model", "text_config", quantization_config=ONLINE)
    with pytest.raises(InputError, match=r"config\.json: text_config\.quantization_config asks for bitnet"):
        describe(folder)


@pytest.mark.parametrize(
    ("method", "suffix", "dtype"),
    [("gptq", "qweight", torch.int32), ("bitsandbytes", "weight", torch.uint8), ("fp8", "weight", torch.float8_e4m3fn)],
)
def test_weights_that_are_stored_quantised_are_refused_with_the_cure(saved_llama, tmp_path, method, suffix, dtype):
    folder = with_keys(saved_llama, tmp_path / "model", quantization_config={"quant_method": method})
    tensors = load_file(folder / "model.safetensors")
    matrix = "model.layers.0.mlp.up_proj"
    tensors[f"{matrix}.{suffix}"] = tensors.pop(f"{matrix}.weight").to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = (
        rf"the weights are quantised by {method} \(quantization_config in config.json; {matrix}.{suffix} is \w+\), but only "
    )
    message += r"dense weights can be compressed; use the original model, or .*model.dequantize\(\), then save_pretrained$"
    for way in (describe, shape_of):
        with pytest.raises(InputError, match=message):
            way(folder)


def test_a_dtype_that_is_not_read_is_named(saved_llama, tmp_path):
    folder = shutil.copytree(saved_llama, tmp_path / "model")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for way in (describe, shape_of):
        with pytest.raises(InputError, match="stored as F8_E4M3; winnow reads F64, F32"):
            way(folder)


def test_a_checkpoint_is_held_to_the_same(saved_llama, tmp_path):
    """By all that reads one: nothing but winnow's own key at its own place is followed."""
    checkpoint = build(saved_llama, tmp_path / "work", ["ffn"], 0.6)
    folder = with_keys(checkpoint, tmp_path / "copy", text_config={"quantization_config": ONLINE})
    (folder / "manifest.json").unlink()  # as one that was saved again
    for way in (WAYS["load_model"], WAYS["Streamed"], Checkpoint):
        with pytest.raises(InputError, match=r"text_config\.quantization_config asks for bitnet"):
            way(folder)


def test_masks_and_positions_of_old_files_are_no_quantised_weights(tmp_path):
    pico("gpt2").save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    tensors["transformer.position_ids"] = torch.arange(4)[None]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="the weights are not quantised"):
        describe(with_keys(tmp_path / "source", tmp_path / "model", quantization_config=ONLINE))


@pytest.mark.parametrize("way", [describe, model_digests])
def test_a_compressed_checkpoint_is_no_source(saved_llama, tmp_path, way):
    checkpoint = build(saved_llama, tmp_path / "work", ["ffn"], 0.6)
    with pytest.raises(InputError) as caught:
        way(checkpoint)
    assert str(caught.value) == (
        f"{checkpoint}: a compressed checkpoint of winnow, not a dense model; use the model that it was made from, or export it "
        "as a dense model with `python -m winnow export`"
    )
    export_dense(checkpoint, tmp_path / "dense", {})
    assert way(tmp_path / "dense")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"return_dict": False},
            r"config\.json: return_dict makes the model return tuples, which have no logits; delete the key",
        ),
        ({"fusion_config": {"patch_embeddings": True}}, r"config\.json: fusion_config replaces modules .*; delete the key"),
        (
            {"attn_implementation": "kernels-community/flash-attn"},
            r"config\.json: attn_implementation names code of a hub repository, which is never run; delete the key",
        ),
        ({"_attn_implementation": {"": "someone/kernel"}}, r"config\.json: _attn_implementation names code of a hub"),
        ({"attn_implementation": "flash_attention_4"}, r"config\.json: LlamaForCausalLM cannot be created from it: Flash"),
        ({"pad_token_id": 5000}, r"config\.json: LlamaForCausalLM cannot be created from it: Padding_idx must be within"),
    ],
)
def test_other_keys_that_change_what_is_computed(saved_llama, tmp_path, keys, message):
    folder = with_keys(saved_llama, tmp_path / "model", **keys)
    with pytest.raises(InputError, match=message):
        describe(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder, "float32", "cpu")


def test_keys_that_change_nothing_are_let_be(saved_llama, tmp_path):
    """As src/winnow/models/config_json.py says of them: the same logits by every way of loading."""
    ids = torch.arange(16)[None]
    keys = {"attention_dropout": 0.5, "gradient_checkpointing": True, "use_cache": False, "output_hidden_states": True}
    keys |= {"dtype": "float16", "auto_map": {"AutoModel": "mine.Model"}, "base_model_tp_plan": {"layers.*": "colwise"}}
    folder = with_keys(saved_llama, tmp_path / "model", **keys)
    describe(folder)
    with torch.no_grad():
        found, expected = (load_model(path, "float32", "cpu")(input_ids=ids).logits for path in (folder, saved_llama))
        streamed = Streamed(folder, "float32", "cpu", tmp_path / "artefact", 16)
        for layer in streamed.remaining():
            with streamed.block(layer):
                streamed.run(0, {"input_ids": ids})
            streamed.advance(layer)
        with streamed.passed():
            torch.testing.assert_close(streamed.logits(0, ids[0], slice(0, 16))[None], expected, atol=1e-6, rtol=0)
    assert torch.equal(found, expected)


def test_a_distributed_checkpoint_beside_the_weights_is_refused(saved_llama, tmp_path):
    """transformers reads it in place of model.safetensors."""
    folder = shutil.copytree(saved_llama, tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match=r"contains a distributed checkpoint \(shard-00001-model-00001-of-00001\.safetensors\)"):
        describe(folder)
