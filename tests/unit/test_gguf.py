"""The export to GGUF, read by the package gguf: the same numbers, the entries of the file, and refusals by name. llama.cpp itself
is in `tests/engines`."""

import json
import shutil
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from tests.conftest import ROOT, TINY
from tests.pages import documented
from tests.unit import exports, test_checkpoint
from tests.unit.test_checkpoint import build
from tests.unit.test_export_engines import GRIDS, random_module
from winnow.__main__ import main
from winnow.checkpoint.export import Checkpoint, export_dense
from winnow.engines.gguf.blocks import Grid, grid_of
from winnow.engines.gguf.export import export_gguf
from winnow.engines.gguf.families import FAMILIES
from winnow.engines.gguf.tokenizer import entries
from winnow.engines.speed import uncompressed
from winnow.io.artifacts import Bundle
from winnow.models.architectures import ARCHITECTURES

TOKENIZER = next((ROOT / "resources").rglob("tokenizer.json"))
ALL = ["ffn", "attention"]

refused = partial(exports.refused, form="gguf")


def with_tokenizer(checkpoint: Path) -> Path:
    shutil.copyfile(TOKENIZER, checkpoint / "tokenizer.json")
    (checkpoint / "manifest.json").unlink(missing_ok=True)  # a checkpoint saved by `save_pretrained` has none either
    return checkpoint


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file in float32."""
    found = GGUFReader(directory / "model.gguf").tensors
    return {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in found}


def entry(directory: Path, key: str):
    field = GGUFReader(directory / "model.gguf").get_field(key)
    return field and field.contents()


@pytest.mark.parametrize("columns", [96, 172])
@pytest.mark.parametrize("group", [32, 64, 128, 172])
@pytest.mark.parametrize(("bits", "grid"), list(product(range(2, 9), GRIDS)))
def test_blocks_hold_every_grid_exactly(bits, grid, group, columns):
    """As the package reads them; 128 leaves a part of a group, and 172 a part of a block, which is filled up with zeros."""
    module = random_module(bits, grid, min(group, columns), columns)
    own = grid_of(module)
    widest = 2**bits - 1 if grid == "asymmetric" else 2 ** (bits - 1)
    if widest > 128:
        assert own is None
        return
    kind, array = own.data()
    assert kind.name == ("Q4_0" if widest <= 8 else "Q5_0" if widest <= 16 else "Q8_0")
    read = torch.from_numpy(dequantize(array, kind))
    assert torch.equal(read[:, :columns], module.matrix())
    assert not read[:, columns:].any()


def test_the_type_with_the_fewest_bits_that_has_all_codes():
    """Zero points that happen to leave small integers do not cost a bit; integers of 9 bits have no type."""
    scales = torch.ones(1, 1)
    for lowest, highest, name in ((-8, 7, "Q4_0"), (-9, 0, "Q5_0"), (0, 16, "Q8_0"), (-128, 127, "Q8_0")):
        codes = torch.zeros(1, 32)
        codes[0, 0], codes[0, 31] = lowest, highest
        assert Grid(codes, scales).type().name == name
    assert Grid(torch.full((1, 32), 128.0), scales).type() is None
    with pytest.raises(ValueError, match="more than 8 bits"):
        Grid(torch.full((1, 32), 128.0), scales).data()


@pytest.mark.parametrize("group", [16, 40])
def test_groups_of_parts_of_blocks_are_not_stored_in_blocks(group):
    assert grid_of(random_module(4, "full", group)) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_numbers_of_its_dense_export(name, saved, tmp_path):
    """In all tensors, with their rows in llama.cpp's order: blocks of the checkpoint against float32 of its dense export."""
    checkpoint = with_tokenizer(build(saved(name), tmp_path / "work", ALL, 0.6, "rounded", bits=[4], grids=["full"]))
    made = export_gguf(checkpoint, tmp_path / "blocks", None)
    export_dense(checkpoint, tmp_path / "dense", None)
    export_gguf(uncompressed(tmp_path / "dense", tmp_path / "plain"), tmp_path / "floats", None)
    found, own = tensors(tmp_path / "blocks"), tensors(tmp_path / "floats")
    assert made.error == 0
    assert set(found) == set(own)
    for key, tensor in own.items():
        assert np.array_equal(found[key], tensor), key
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "blocks" / "model.gguf").tensors}
    matrices = [key for key in kinds if key.split(".")[2:3] and kinds[key] == "Q4_0"]
    assert len(matrices) == 2 * len(ARCHITECTURES[name].modules)


def test_queries_and_keys_of_llama_are_in_the_order_of_its_rotation(saved, tmp_path):
    """Channels i and i + 8 of a head of 16, which transformers rotates together, are neighbours in the file."""
    checkpoint = uncompressed(saved("llama"), tmp_path / "dense")
    shutil.copyfile(TOKENIZER, checkpoint / "tokenizer.json")
    export_gguf(checkpoint, tmp_path / "out", None)
    weight = load_file(checkpoint / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].numpy()
    found = tensors(tmp_path / "out")["blk.0.attn_k.weight"]
    assert np.array_equal(found[16:20], weight[[16, 24, 17, 25]])


def test_the_entries_describe_the_model(saved, tmp_path):
    checkpoint = uncompressed(saved("gpt_neox"), tmp_path / "dense")
    shutil.copyfile(TOKENIZER, checkpoint / "tokenizer.json")
    export_gguf(checkpoint, tmp_path / "out", None)
    options, expected = TINY["gpt_neox"][1], {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 4}
    expected |= {"embedding_length": options["hidden_size"], "feed_forward_length": options["intermediate_size"]}
    expected |= {"context_length": 64, "rope.dimension_count": 2, "rope.freq_base": 10000.0, "use_parallel_residual": True}
    for key, value in expected.items():
        assert entry(tmp_path / "out", f"gptneox.{key}") == value, key
    assert entry(tmp_path / "out", "gptneox.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert entry(tmp_path / "out", "general.architecture") == "gptneox"
    assert entry(tmp_path / "out", "tokenizer.ggml.bos_token_id") == 0
    vocabulary = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = entry(tmp_path / "out", "tokenizer.ggml.tokens")
    assert all(tokens[index] == token for token, index in vocabulary.items())


def test_a_window_that_llama_cpp_lacks_limits_the_context(saved, tmp_path):
    checkpoint = uncompressed(saved("mistral"), tmp_path / "dense")
    shutil.copyfile(TOKENIZER, checkpoint / "tokenizer.json")
    made = export_gguf(checkpoint, tmp_path / "out", None)
    assert entry(tmp_path / "out", "llama.context_length") == TINY["mistral"][1]["sliding_window"] == 16
    assert "the context is limited to 16 tokens" in made.said


def sliced(source: Path, work: Path, monkeypatch, sizes: tuple[int, int]) -> Path:
    """A checkpoint whose two FFNs have these neurons."""
    names = {0: "000", 1: "001"}

    def given(groups, budget):
        of = {g.name: next(size for layer, size in enumerate(sizes) if g.name.startswith(names[layer])) for g in groups}
        return type("Sizes", (), {"sizes": of})

    monkeypatch.setattr(test_checkpoint, "allocate", given)
    return with_tokenizer(build(source, work, ["ffn"], 0.6, "neuron_slice"))


def test_ffns_have_their_own_lengths(saved, tmp_path, monkeypatch):
    """Llama's, without the dropped neurons; in a family with one length the shorter FFN has zeros."""
    checkpoint = sliced(saved("llama"), tmp_path / "llama", monkeypatch, (40, 64))
    made = export_gguf(checkpoint, tmp_path / "out", None)
    assert entry(tmp_path / "out", "general.architecture") == "deci"
    assert entry(tmp_path / "out", "deci.feed_forward_length") == [40, 64]
    assert "FFNs have lengths from 40 to 64" in made.said
    found, stored = tensors(tmp_path / "out"), load_file(checkpoint / "model.safetensors")
    for layer, length in enumerate((40, 64)):
        assert found[f"blk.{layer}.ffn_down.weight"].shape == (64, length)
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        np.testing.assert_allclose(found[f"blk.{layer}.ffn_up.weight"], stored[name].numpy(), atol=1e-7)
    checkpoint = sliced(saved("qwen2"), tmp_path / "qwen2", monkeypatch, (8, 24))
    export_gguf(checkpoint, tmp_path / "one", None)
    assert entry(tmp_path / "one", "qwen2.feed_forward_length") == 24
    found = tensors(tmp_path / "one")
    assert not found["blk.0.ffn_up.weight"][8:].any()
    assert not found["blk.0.ffn_down.weight"][:, 8:].any()
    assert found["blk.0.ffn_up.weight"][:8].any()


def test_equal_lengths_keep_the_architecture(saved, tmp_path, monkeypatch):
    export_gguf(sliced(saved("llama"), tmp_path / "work", monkeypatch, (48, 48)), tmp_path / "out", None)
    assert entry(tmp_path / "out", "general.architecture") == "llama"
    assert entry(tmp_path / "out", "llama.feed_forward_length") == 48


def test_factors_are_multiplied_out_in_the_type_of_choice(saved, tmp_path):
    """What that rounds is the error of the export."""
    checkpoint = with_tokenizer(build(saved("llama"), tmp_path / "work", ALL, 0.6))
    export_dense(checkpoint, tmp_path / "dense", None)
    exact = load_file(tmp_path / "dense" / "model.safetensors")
    errors, name_of = {}, {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
    for kind in name_of:
        made = export_gguf(checkpoint, tmp_path / kind, None, matrices=kind, embeddings="float32")
        errors[kind], lost, size = made.error, 0.0, 0.0
        found = tensors(tmp_path / kind)
        for layer, (role, name) in product(range(2), {"mlp.up_proj": "ffn_up", "self_attn.v_proj": "attn_v"}.items()):
            weight = exact[f"model.layers.{layer}.{role}.weight"].numpy()
            lost += float(np.square(found[f"blk.{layer}.{name}.weight"] - weight).sum())
            size += float(np.square(weight).sum())
        assert (lost / size) ** 0.5 == pytest.approx(made.error, rel=0.3, abs=1e-7)
        assert f"14 of 14 compressed matrices are multiplied out (14 {name_of[kind]})" in made.said
    assert errors["float32"] < 1e-6 < errors["float16"] < 1e-3 < errors["q8_0"] < 1e-2
    export_gguf(checkpoint, tmp_path / "embeddings", None, embeddings="q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "embeddings" / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.0.ffn_norm.weight"] == "F32"


def test_refusals_of_checkpoints_in_one_line(saved, tmp_path, monkeypatch):
    checkpoint = build(saved("opt"), tmp_path / "opt", ALL, 0.6, "rounded")
    known = "only gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral, phi3, qwen2, qwen3"
    assert f"model type 'opt' cannot be exported to gguf ({known})" in refused(tmp_path, checkpoint, monkeypatch)
    checkpoint = with_tokenizer(build(saved("llama"), tmp_path / "affine", ["ffn"], 0.6, "affine_block"))
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert "model.layers.0.mlp.act_fn: affine_block replaces the FFN's activation, for which llama.cpp has no place" in line
    checkpoint = build(saved("llama"), tmp_path / "rounded", ALL, 0.6, "rounded", group=16)
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert "no tokenizer.json, which a GGUF file is made with" in line
    with_tokenizer(checkpoint)
    line = refused(tmp_path, checkpoint, monkeypatch, "--matrices", "q8_0", form="dense")
    assert "--matrices: the format dense has no such option" in line
    export_gguf(checkpoint, tmp_path / "other", None, matrices="q8_0")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["format_version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "the checkpoint has winnow format 99, but this installation reads" in refused(
        tmp_path, checkpoint, monkeypatch, form="gguf"
    )


def test_rows_that_are_no_blocks_are_refused_in_q8_0(saved, tmp_path, monkeypatch):
    """But FFNs are filled up."""
    name, options = TINY["gpt2"]
    model = getattr(transformers, name)
    model(model.config_class(**{**options, "n_embd": 24})).save_pretrained(tmp_path / "narrow")
    checkpoint = with_tokenizer(build(tmp_path / "narrow", tmp_path / "gpt2", ["ffn"], 0.6))
    line = refused(tmp_path, checkpoint, monkeypatch, "--matrices", "q8_0")
    assert "transformer.h.0.attn.c_attn: its rows have 24 numbers, which is no multiple of 32; choose another type" in line
    checkpoint = with_tokenizer(build(tmp_path / "narrow", tmp_path / "rounded", ALL, 0.6, "rounded", bits=[4]))
    said = export_gguf(checkpoint, tmp_path / "floats", None).said
    assert "2 of 8 compressed matrices have the numbers of the checkpoint (2 Q4_0); 6 of 8" in said
    assert tensors(tmp_path / "floats")["blk.0.attn_qkv.weight"].shape == (72, 24)
    checkpoint = sliced(saved("llama"), tmp_path / "work", monkeypatch, (40, 64))
    export_gguf(checkpoint, tmp_path / "filled", None, matrices="q8_0")
    assert entry(tmp_path / "filled", "llama.feed_forward_length") == 64, "both FFNs"


OPTIONS = [
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias"),
    ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "layer_types"),
]


@pytest.mark.parametrize(("name", "options", "key"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_options_that_llama_cpp_lacks_are_refused_by_name(name, options, key, saved, tmp_path, monkeypatch):
    checkpoint = uncompressed(saved(name), tmp_path / "dense")
    shutil.copyfile(TOKENIZER, checkpoint / "tokenizer.json")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")) | options
    if "attention_bias" in options:  # as a model of this config is stored
        model = getattr(transformers, TINY[name][0])
        made = model(model.config_class(**{**TINY[name][1], **options}))
        (checkpoint / "model.safetensors").unlink()
        made.save_pretrained(tmp_path / "other")
        (checkpoint / "model.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert f"config.json: {key}: " in line
    assert "cannot be exported to gguf: " in line


def changed(content: dict, path: str, value) -> dict:
    *parents, last = path.split(".")
    part = content
    for key in parents:
        part = part[key]
    part[last] = value
    return content


TOKENIZERS = [
    ("model.type", "WordPiece", "compared with type BPE alone"),
    ("model.continuing_subword_prefix", "##", "llama.cpp has no continuing_subword_prefix"),
    ("pre_tokenizer", {"type": "Whitespace"}, "has no pre-tokenizer"),
    ("normalizer", {"type": "Lowercase"}, "has no normalizer Lowercase"),
    ("model.byte_fallback", True, "normalizer or pre-tokenizer does more"),
    ("model.ignore_merges", True, "has no ignore_merges True"),
]


@pytest.mark.parametrize(("path", "value", "why"), TOKENIZERS, ids=[path for path, _, _ in TOKENIZERS])
def test_tokenizers_that_llama_cpp_lacks_are_refused_by_name(path, value, why, saved, tmp_path, monkeypatch):
    checkpoint = uncompressed(saved("llama"), tmp_path / "dense")
    content = changed(json.loads(TOKENIZER.read_text(encoding="utf-8")), path, value)
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert "tokenizer.json: " in line
    assert why in line or path == "model.type"  # the library may refuse it first


def test_merges_that_are_not_those_of_sentencepiece_are_refused(saved, tmp_path, monkeypatch):
    """They would make other tokens there."""
    checkpoint = uncompressed(saved("llama"), tmp_path / "dense")
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    vocabulary = {token: index for index, token in enumerate(["<unk>", "a", "b", "c", "ab", "bc", "abc"])}
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary}
    content["model"]["merges"] = [["a", "b"], ["b", "c"], ["ab", "c"]]  # and not "a" with "bc"
    content |= {"normalizer": None, "added_tokens": [], "post_processor": None}
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert "not all pairs that make the token 'abc' are merged" in refused(tmp_path, checkpoint, monkeypatch)
    content["model"]["merges"].append(["a", "bc"])
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = entries(checkpoint, Checkpoint(checkpoint).dense.config)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.scores"][4:7] == [0, -1, -2]
    assert found["tokenizer.ggml.token_type"][:8] == [2, 1, 1, 1, 1, 1, 1, 5]


def test_a_number_too_large_for_the_type_leaves_nothing(saved, tmp_path, monkeypatch):
    checkpoint = uncompressed(saved("llama"), tmp_path / "dense")
    shutil.copyfile(TOKENIZER, checkpoint / "tokenizer.json")
    stored = load_file(checkpoint / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    (checkpoint / "model.safetensors").unlink()
    test_checkpoint.save_file(stored, checkpoint / "model.safetensors", {"format": "pt"})
    line = refused(tmp_path, checkpoint, monkeypatch, "--dtype", "float16")
    assert "model.layers.1.mlp.up_proj: not finite as torch.float16; use another --dtype" in line


def test_without_the_library_one_line_says_what_to_install(saved_llama, tmp_path, monkeypatch):
    checkpoint = build(saved_llama, tmp_path / "work", ALL, 0.6, "rounded")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in [name for name in sys.modules if name.startswith("winnow.engines.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert line == "winnow: export: needs gguf, which is not installed; run `pip install '.[engines]'` in winnow's checkout"


def test_the_documented_command_says_bytes_and_what_is_exact(saved_llama, tmp_path, monkeypatch, capsys):
    checkpoint = build(saved_llama, tmp_path / "work", ALL, 0.6, "rounded", bits=[4])
    recipe = (checkpoint / "recipe.yaml").read_text(encoding="utf-8")
    with_tokenizer(checkpoint)
    (command,) = documented("winnow export --format gguf")
    words = command.replace("<checkpoint>", str(checkpoint)).replace("<new directory>", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", words.split())
    main()
    said, out = capsys.readouterr().out, tmp_path / "out"
    size, stored = (out / "model.gguf").stat().st_size, (checkpoint / "model.safetensors").stat().st_size
    assert f"out: {size:,} bytes, {size / stored:.2f} of the checkpoint's {stored:,}; " in said
    assert "14 of 14 compressed matrices have the numbers of the checkpoint (14 Q4_0)" in said
    assert Bundle(out / "manifest.json").manifest["model_stored_bytes"] == size
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "manifest.json", "model.gguf", "recipe.yaml"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# pico, compressed by winnow, for llama.cpp" in card
    assert "14 of 14 compressed matrices have the numbers of the checkpoint (14 Q4_0)" in card.replace("\n", " ")
    assert f"{size:,} bytes" in card
    assert (out / "recipe.yaml").read_text(encoding="utf-8") == recipe
    export_gguf(checkpoint, tmp_path / "again", None)
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()
