"""Retrieval: canonical names, damaged and hostile directories, and the hub's layout without a network."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import pico
from winnow.checkpoint.loading import load_model
from winnow.errors import InputError
from winnow.io.artifacts import write_json
from winnow.models.architectures import select
from winnow.models.files import ModelFiles, model_files
from winnow.models.retrieve import describe, fetch


def copy_of(folder, tmp_path, change):
    """A copy of a model directory with its tensors changed."""
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "copy"


def test_every_family_is_described_whole(saved_model, tmp_path):
    facts = describe(saved_model)
    write_json(tmp_path / "model.json", facts)
    files = ModelFiles(tmp_path / "model.json")
    model = load_model(saved_model, "float32", "cpu")
    state = model.state_dict()
    assert set(facts["tensors"]) | set(facts["tied"]) == set(state)
    assert facts["bytes"] == sum(state[n].nbytes for n in facts["tensors"])
    for name in facts["tensors"]:
        assert torch.equal(files.tensor(name), state[name])
    for matrix in files.matrices:
        x = torch.randn(3, matrix.shape[1])
        module = model.get_submodule(matrix.module)
        bias = module.bias if matrix.bias else torch.zeros(matrix.shape[0])
        torch.testing.assert_close(module(x), x @ files.weight(matrix).float().T + bias, atol=1e-5, rtol=1e-4)
    roles = {m.role for m in select(files.matrices, ["ffn"])}
    assert "down_proj" in roles
    assert not roles & {"q_proj", "qkv_proj", "o_proj"}
    assert files.dense_bytes(files.matrices) < facts["bytes"]


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Names without the prefix, and mask buffers that the model no longer has."""
    pico("gpt2").save_pretrained(tmp_path / "plain")

    def as_on_the_hub(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    folder = copy_of(tmp_path / "plain", tmp_path, as_on_the_hub)
    assert describe(folder)["tensors"].keys() == describe(tmp_path / "plain")["tensors"].keys()
    assert describe(folder)["tensors"]["transformer.h.0.attn.c_attn.weight"]["key"] == "h.0.attn.c_attn.weight"


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[NAME].__setitem__((2, 3), float("nan")), rf"{NAME} has 1 values that are not finite"),
        (lambda t: t.pop(NAME), rf"{NAME} is missing"),
        (lambda t: t.__setitem__("model.layers.1.mlp.extra.weight", t.pop(NAME)), r"unexpected tensor model.layers.1.mlp.extra"),
        (lambda t: t.__setitem__(NAME, t[NAME][:-1].clone()), rf"{NAME} has shape \[95, 64\], the config says \[96, 64\]"),
    ],
)
def test_damaged_weights_are_named(saved_llama, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        describe(copy_of(saved_llama, tmp_path, change))


def test_directories_that_are_no_models(saved_llama, tmp_path):
    with pytest.raises(InputError, match="no such model directory"):
        model_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        model_files(tmp_path / "empty")
    shutil.copytree(saved_llama, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle file, which can run code and is refused"):
        model_files(tmp_path / "pickled")
    broken = shutil.copytree(saved_llama, tmp_path / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(InputError, match="incomplete or not a safetensors file"):
        describe(tmp_path / "broken")


def test_only_the_files_that_transformers_reads_count(saved_llama, tmp_path):
    stray = shutil.copytree(saved_llama, tmp_path / "stray")
    doubled = {name: 2 * tensor for name, tensor in load_file(stray / "model.safetensors").items()}
    save_file(doubled, stray / "model_old.safetensors", metadata={"format": "pt"})
    assert {t["file"] for t in describe(stray)["tensors"].values()} == {"model.safetensors"}
    other = shutil.copytree(saved_llama, tmp_path / "other")
    (other / "model.safetensors").rename(other / "weights.safetensors")
    (other / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no model\.safetensors and no index.*pickle"):
        model_files(other)
    escaping = shutil.copytree(saved_llama, tmp_path / "escaping")
    (escaping / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {NAME: "../outside.safetensors"}}
    (escaping / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names '\.\./outside\.safetensors'"):
        model_files(escaping)


def test_one_tensor_under_two_names_is_refused(saved_llama, tmp_path):
    folder = copy_of(saved_llama, tmp_path, lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}))
    with pytest.raises(InputError, match=r"norm\.weight .*both the tensor model\.norm\.weight"):
        describe(folder)


def test_a_tied_head_that_differs_is_refused(saved_llama, tmp_path):
    embedding = "model.embed_tokens.weight"
    same = copy_of(saved_llama, tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert "lm_head.weight" not in describe(same)["tensors"]
    shutil.rmtree(same)
    other = copy_of(saved_llama, tmp_path, lambda t: t.update({"lm_head.weight": 1.5 * t[embedding]}))
    with pytest.raises(InputError, match=r"ties lm_head\.weight to .* two different tensors"):
        describe(other)


def test_broken_configs_are_one_line(saved_llama, tmp_path):
    folder = shutil.copytree(saved_llama, tmp_path / "model")
    for text, message in (("{", "not a model config"), (json.dumps({"model_type": "unheard_of"}), "not know .*'unheard_of'")):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=rf"config\.json: .*{message}") as caught:
            describe(folder)
        assert "\n" not in str(caught.value)


def test_weights_replaced_after_retrieval_are_refused(saved_llama, tmp_path):
    folder = copy_of(saved_llama, tmp_path, lambda t: None)
    write_json(tmp_path / "model.json", describe(folder))
    pico("llama", seed=5).save_pretrained(folder)
    with pytest.raises(InputError, match=r"model\.safetensors: changed since the model was retrieved"):
        ModelFiles(tmp_path / "model.json").tensor(NAME)


def test_unknown_family_and_unknown_target(saved_llama, tmp_path):
    facts = describe(saved_llama)
    write_json(tmp_path / "model.json", {**facts, "model_type": "unheard_of"})
    with pytest.raises(InputError, match=r"'unheard_of' is not in src/winnow/models/architectures\.py"):
        ModelFiles(tmp_path / "model.json")
    write_json(tmp_path / "model.json", facts)
    with pytest.raises(InputError, match="target 'qkv_proj' names no matrix"):
        select(ModelFiles(tmp_path / "model.json").matrices, ["qkv_proj"])


@pytest.fixture
def hub_cache(saved_llama, tmp_path, monkeypatch):
    """A hub cache with one snapshot, laid out as huggingface_hub does: blobs, and links to them by revision."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--pico"
    snapshot = repository / "snapshots" / revision
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(saved_llama.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{index:040x}")
        (snapshot / path.name).symlink_to(repository / "blobs" / f"{index:040x}")
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return revision


def test_hub_snapshot_is_found_without_network(hub_cache, saved_llama, tmp_path):
    folder = fetch("someone/pico", hub_cache, cache=tmp_path / "hub")
    assert describe(folder)["tensors"].keys() == describe(saved_llama)["tensors"].keys()
    with pytest.raises(InputError, match="someone/other@01234567: not in the local hub cache"):
        fetch("someone/other", hub_cache, cache=tmp_path / "hub")


def test_tied_embeddings_count_once(saved_llama):
    facts = describe(saved_llama)
    assert facts["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in facts["tensors"]
    config = json.loads((saved_llama / "config.json").read_text())
    assert config["tie_word_embeddings"]
