"""Checkpoints: bytes, loading in a new process, damage, format versions, and naive loading."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import winnow.checkpoint
from tests.conftest import VOCABULARY
from winnow.allocation import allocate, chosen_groups, summarize
from winnow.checkpoint import compress, recipe_of, write_checkpoint
from winnow.errors import InputError
from winnow.factors import fit_groups
from winnow.io import Bundle, write_json, write_manifest, write_tensors
from winnow.loading import load_model
from winnow.metrics import metric_of
from winnow.models import ModelFiles
from winnow.retrieve import describe
from winnow.structures import STRUCTURES, structure_of

METHOD = {"structure": {"kind": "low_rank"}, "metric": {"kind": "weights"}}
SMALL = {"bypass": {"kept": 2}}  # options that suit matrices of 32 channels
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def build(source: Path, work: Path, targets: list[str], keep: float, kind: str = "low_rank") -> Path:
    """All stages from a model directory to a checkpoint, as the scripts run them."""
    write_json(work / "model.json", describe(source))
    files = ModelFiles(work / "model.json")
    structure, metric = structure_of({"kind": kind, **SMALL.get(kind, {})}), metric_of(METHOD["metric"])
    names, errors = [], {}
    for name, fit in fit_groups(files, None, structure, metric, "1-of-1", "cpu"):
        write_tensors(work / "factors" / f"{name}.safetensors", {k: v.float() for k, v in fit.tensors.items()})
        names.append(name)
        errors[name] = fit.error.tolist()
    write_manifest(work / "factors", {"groups": names}, {})
    groups = chosen_groups(files, structure, targets)
    sizes = allocate(groups, {"keep_bytes": keep, "rank": None, "rank_fraction": None})
    stored, layouts = compress(files, dict.fromkeys(names, Bundle(work / "factors" / "manifest.json")), structure, sizes)
    presets = {"model": {"source": "somewhere"}, "method": METHOD, "budget": {"targets": targets}}
    recipe = recipe_of({"model": "pico"}, presets, summarize(groups, sizes, errors))
    write_checkpoint(work / "checkpoint", files, stored, layouts, "float32", recipe, {})
    return work / "checkpoint"


@pytest.fixture(scope="module", params=STRUCTURES)
def checkpoint(request, saved_model, tmp_path_factory) -> Path:
    """Every structure on every family."""
    return build(saved_model, tmp_path_factory.mktemp("work"), ["ffn", "attention"], 0.6, request.param)


@pytest.fixture
def llama_checkpoint(saved_llama, tmp_path) -> Path:
    return build(saved_llama, tmp_path / "work", ["ffn"], 0.6)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_bytes_in_the_file_are_the_bytes_reported(checkpoint, saved_model):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    assert manifest["model_stored_bytes"] == sum(t.nbytes for t in tensors.values())
    layers = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["layers"]
    compressed = [t.nbytes for name, t in tensors.items() if any(name.startswith(f"{m}.") for m in layers)]
    assert manifest["stored_bytes"] == sum(compressed)
    assert manifest["model_stored_bytes"] - manifest["stored_bytes"] == describe(saved_model)["bytes"] - manifest["dense_bytes"]


def test_a_new_process_gives_the_same_bits(saved_model, tmp_path):
    """Every structure of a family in one process that knows nothing but `import winnow`."""
    folders = [build(saved_model, tmp_path / kind, ["ffn", "attention"], 0.6, kind) for kind in STRUCTURES]
    code = (
        "import sys, torch, winnow; from safetensors.torch import save_file; from transformers import AutoModelForCausalLM\n"
        f"ids = torch.tensor({IDS.tolist()}); torch.set_num_threads({torch.get_num_threads()})\n"
        "models = {path: AutoModelForCausalLM.from_pretrained(path).eval() for path in sys.argv[2:]}\n"
        "with torch.no_grad(): save_file({p: m(input_ids=ids).logits for p, m in models.items()}, sys.argv[1])"
    )
    out = tmp_path / "out.safetensors"
    subprocess.run([sys.executable, "-c", code, str(out), *map(str, folders)], check=True)
    there = load_file(out)
    assert len(there) == len(STRUCTURES)
    for folder in folders:
        assert torch.equal(there[str(folder)], logits(load_model(folder, "float32", "cpu")))


def test_save_load_save_is_stable_and_generates(checkpoint, tmp_path):
    model = load_model(checkpoint, "float32", "cpu")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "third")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "third" / "model.safetensors").read_bytes()
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 7)


def test_dtype_changes_as_for_any_model(checkpoint):
    model = load_model(checkpoint, "float32", "cpu")
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_more_bytes_lose_less(saved_llama, tmp_path):
    dense = logits(load_model(saved_llama, "float32", "cpu"))
    folders = [build(saved_llama, tmp_path / str(keep), ["ffn", "attention"], keep) for keep in (0.3, 0.9)]
    little, much = (float((logits(load_model(folder, "float32", "cpu")) - dense).square().mean()) for folder in folders)
    assert much < little


def damaged(checkpoint: Path, tmp_path: Path, change) -> Path:
    copy = shutil.copytree(checkpoint, tmp_path / "damaged")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


LEFT = "model.layers.1.mlp.down_proj.left.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LEFT), f"the tensor {LEFT} is missing"),
        (
            lambda t: t.__setitem__("model.layers.1.mlp.down_proj.lost.weight", t.pop(LEFT)),
            "unexpected tensor model.layers.1.mlp.down_proj.lost",
        ),
        (lambda t: t.__setitem__(LEFT, t[LEFT][:, :-1].contiguous()), f"{LEFT} has shape"),
        (lambda t: t.pop("model.norm.weight"), "the tensor model.norm.weight is missing"),
    ],
)
def test_damaged_checkpoints_name_the_tensor(llama_checkpoint, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged(llama_checkpoint, tmp_path, change))


def edited(checkpoint: Path, tmp_path: Path, change) -> Path:
    copy = shutil.copytree(checkpoint, tmp_path / "edited")
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=2), "format 2, this installation reads format 1; .*pip install --upgrade winnow"),
        (
            lambda q: next(iter(q["layers"].values())).update(kind="origami"),
            "structure 'origami', which this winnow does not have",
        ),
        (
            lambda q: q["layers"].update({"model.layers.7.mlp.up_proj": {"kind": "low_rank", "in": 2, "out": 2, "rank": 1}}),
            "layers.7.mlp.up_proj",
        ),
    ],
)
def test_formats_from_elsewhere_say_what_to_install(llama_checkpoint, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(llama_checkpoint, tmp_path, change))


def test_transformers_without_winnow_refuses_too(llama_checkpoint):
    """No layer of random numbers behind a warning: the empty `weight` of each module makes plain transformers stop."""
    code = "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(llama_checkpoint)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatched" in done.stderr or "size mismatch" in done.stderr


def test_sharded_checkpoints_load(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(winnow.checkpoint, "SHARD_BYTES", 50_000)
    folder = build(saved_llama, tmp_path, ["ffn"], 0.6)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    whole = tmp_path / "whole"
    monkeypatch.undo()
    assert torch.equal(
        logits(load_model(folder, "float32", "cpu")),
        logits(load_model(build(saved_llama, whole, ["ffn"], 0.6), "float32", "cpu")),
    )


def test_numbers_that_do_not_fit_the_stored_dtype_name_the_module(saved_llama, tmp_path):
    write_json(tmp_path / "model.json", describe(saved_llama))
    files = ModelFiles(tmp_path / "model.json")
    structure = structure_of(METHOD["structure"])
    name = "001.up_proj"
    huge = {"left": torch.full((96, 4), float("inf")), "right": torch.ones(4, 64)}
    write_tensors(tmp_path / "factors" / f"{name}.safetensors", huge)
    write_manifest(tmp_path / "factors", {"groups": [name]}, {})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.left\.weight: not finite as torch\.float32"):
        compress(files, {name: Bundle(tmp_path / "factors" / "manifest.json")}, structure, {name: 3})
