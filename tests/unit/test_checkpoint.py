"""Checkpoints: bytes, loading in a new process, damage, format versions, and naive loading."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import winnow.checkpoint.writer
from tests.conftest import FAMILIES, VOCABULARY
from tests.unit.worlds import FITTED, LOSSY, small
from winnow.allocation.groups import allocate, chosen_groups, experts_left_dense, summarize
from winnow.calibration.clusters import assign_all
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.writer import compress, compressed, recipe_of, write_checkpoint
from winnow.errors import InputError
from winnow.factors.fit import fit_groups, labels_by_matrix, left_dense, storable
from winnow.io.artifacts import Bundle, write_json, write_manifest, write_tensors
from winnow.metrics.base import METRICS
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.structures.base import STRUCTURES

METHOD = {"structure": {"kind": "low_rank"}, "metric": {"kind": "weights"}}
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@cache
def statistics(source: Path, work: Path, windows: int = 8) -> tuple[Bundle, Bundle]:
    """Moments and gradients of a model on windows of 32 random tokens, as the scripts write them."""
    write_json(work / "model.json", describe(source))
    files, model = ModelFiles(work / "model.json"), load_model(source, "float32", "cpu")
    ids = torch.randint(0, VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(1))
    for layer, sites in collect(model, files.matrices, ids, 4, torch.float64):
        tensors = {f"{site}.{key}": value for site, values in sites.items() for key, value in values.items()}
        write_tensors(work / "moments" / moments_file(layer), tensors)
    headless = files.manifest["class"] == "BertModel"
    for layer, roles in () if headless else collect_gradients(model, files.matrices, ids, 4, torch.float64, "model", 0):
        tensors = {f"{role}.{key}": value for role, values in roles.items() for key, value in values.items()}
        write_tensors(work / "gradients" / moments_file(layer), tensors)
    for name in ("moments", "gradients"):
        (work / name).mkdir(exist_ok=True)
        write_manifest(work / name, {}, {})
    return Bundle(work / "moments" / "manifest.json"), Bundle(work / "gradients" / "manifest.json")


def build(
    source: Path, work: Path, targets: list[str], keep: float | None, kind: str = "low_rank", metric: str = "weights", **options
) -> Path:
    """All stages from a model directory to a checkpoint, as the scripts run them; without `keep`, at full size."""
    moments, gradients = statistics(source, source.parent / f"{source.name} statistics")
    files = ModelFiles(source.parent / f"{source.name} statistics" / "model.json")
    structure = STRUCTURES.build({**small(kind), **options})
    if keep is None:
        structure.largest = structure.limit
    used = METRICS.build({"kind": metric}) if structure.objective == "metric" else None
    clustering, labels, rows = structure.clustering(), {}, []
    if clustering:
        labels = labels_by_matrix(pd.concat(pd.DataFrame(part) for part in assign_all(files, moments, clustering)))
    for name, fit, numbers in fit_groups(files, moments, gradients, labels, structure, used, "1-of-1", "cpu"):
        write_tensors(work / "factors" / f"{name}.safetensors", storable(structure, fit))
        rows.append({"group": name, "numbers": numbers, "error": fit.error.tolist()})
    write_manifest(work / "factors", {}, {})
    spectra = pd.DataFrame(rows).set_index("group")
    groups = chosen_groups(files, structure, targets, spectra)
    tokens = left_dense(files, moments, structure, used, "1-of-1")
    left = {name: tokens[name] for name in experts_left_dense(files, structure, targets, spectra)}
    budget = {"keep_bytes": keep, "rank": None, "rank_fraction": None, "allocation": {"kind": "uniform"}}
    # In steps too coarse for so small a model.
    coarse = structure.bias_name is None or kind in ("cluster", "tiers", "coupled") or kind.startswith("rounded")
    if coarse or all(structure.limit(g.matrices) == 1 for g in groups):
        budget |= {"keep_bytes": None, "rank_fraction": 0.4}
    sizes = {g.name: structure.limit(g.matrices) for g in groups} if keep is None else allocate(groups, budget).sizes
    factors = dict.fromkeys(sizes, Bundle(work / "factors" / "manifest.json"))
    parts = list(compressed(files, factors, structure, sizes))
    stored = sum(t.nbytes for part in parts for tensors in part.stored.values() for t in tensors.values())
    total = {"stored_bytes": stored, "dense_bytes": 1, "groups": []}
    method = {"structure": structure.options.model_dump(), "metric": {"kind": metric} if used else None}
    presets = {"model": {"source": "somewhere"}, "method": method, "budget": {"targets": targets}}
    recipe = recipe_of({"model": "pico"}, presets, {**(total if keep is None else summarize(groups, sizes)), "left_dense": left})
    write_checkpoint(work / "checkpoint", files, parts, "float32", recipe, {})
    return work / "checkpoint"


def targets_of(kind: str) -> list[str]:
    return ["ffn"] if STRUCTURES[kind].bias_name is None else ["ffn", "attention"]


@cache
def built(source: Path, kind: str) -> Path:
    """A checkpoint of every kind of structure, made once for all tests that only read it."""
    return build(source, source.parent / f"{source.name} {kind}", targets_of(kind), 0.6, kind)


@pytest.fixture(scope="module", params=FITTED)
def checkpoint(request, saved_model) -> Path:
    """Every structure on every family."""
    return built(saved_model, request.param)


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


def test_a_new_process_gives_the_same_bits(saved, tmp_path):
    """Every structure of every family in one process that knows nothing but `import winnow`, and has no peft."""
    folders = [built(saved(family), kind) for family in FAMILIES for kind in FITTED]
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, winnow; from safetensors.torch import save_file; from transformers import AutoModelForCausalLM\n"
        f"ids = torch.tensor({IDS.tolist()}); torch.set_num_threads({torch.get_num_threads()})\n"
        "models = {path: AutoModelForCausalLM.from_pretrained(path).eval() for path in sys.argv[2:]}\n"
        "with torch.no_grad(): save_file({p: m(input_ids=ids).logits for p, m in models.items()}, sys.argv[1])"
    )
    out = tmp_path / "out.safetensors"
    subprocess.run([sys.executable, "-c", code, str(out), *map(str, folders)], check=True)
    there = load_file(out)
    assert len(there) == len(FAMILIES) * len(FITTED)
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


@pytest.mark.parametrize("kind", [kind for kind in FITTED if kind not in LOSSY])
def test_at_full_size_the_logits_are_those_of_the_dense_model(saved_model, tmp_path, kind):
    """T5, through the cache and the checkpoint, where numbers are float32."""
    dense = logits(load_model(saved_model, "float32", "cpu"))
    full = build(saved_model, tmp_path, targets_of(kind), None, kind)
    torch.testing.assert_close(logits(load_model(full, "float32", "cpu")), dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cluster", {"axis": "rows", "by": "cosine"}),
        ("cluster", {"axis": "neurons", "by": "random"}),
        ("bypass", {"remainder": {"kind": "shared_basis"}}),
        ("split", {"exact": 0.0}),
        ("split_affine", {"light": "dropped"}),
        ("neuron_slice", {"correction": "none"}),
        ("rounded", {"bits": [8], "group": 5}),
        ("bypass", {"remainder": {"kind": "rounded", "bits": [3]}}),
        ("by_target", {"parts": {"attention": {"kind": "rounded", "bits": [7]}, "ffn": {"kind": "rounded", "bits": [4]}}}),
    ],
)
def test_variants_load_and_save_too(saved_model, tmp_path, kind, options):
    folder = build(saved_model, tmp_path, targets_of(kind), 0.6, kind, **options)
    model = load_model(folder, "float32", "cpu")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(model))


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
        (
            lambda q: q.update(format_version=3),
            "format 3, but this installation reads formats 1, 2; .*pip install --upgrade winnow",
        ),
        (
            lambda q: next(iter(q["layers"].values())).update(kind="origami"),
            "structure 'origami', which this version of winnow lacks",
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


def test_transformers_without_winnow_refuses_too(saved):
    """No layer of random numbers behind a warning: an empty or smaller `weight` in every form makes plain transformers stop."""
    folders = [built(saved(family), kind) for family in FAMILIES for kind in FITTED]
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "for path in sys.argv[1:]:\n"
        "    try: AutoModelForCausalLM.from_pretrained(path); print('loaded', path)\n"
        "    except Exception as error: assert 'mismatch' in str(error), error"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded" not in done.stdout, done.stdout


def test_sharded_checkpoints_load(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(winnow.checkpoint.writer, "SHARD_BYTES", 50_000)
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
    structure = STRUCTURES.build(METHOD["structure"])
    name = "001.up_proj"
    huge = {"left": torch.full((96, 4), float("inf")), "right": torch.ones(4, 64)}
    write_tensors(tmp_path / "factors" / f"{name}.safetensors", huge)
    write_manifest(tmp_path / "factors", {"groups": [name]}, {})
    factors = {name: Bundle(tmp_path / "factors" / "manifest.json")}
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.left\.weight: not finite as torch\.float32"):
        compress(files, factors, structure, {name: 3})
    for error in (np.linalg.LinAlgError, torch.linalg.LinAlgError):  # and so does a decomposition that fails
        structure.stored = Mock(side_effect=error("SVD did not converge"))
        with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.up_proj: SVD did not converge$"):
            compress(files, factors, structure, {name: 3})
