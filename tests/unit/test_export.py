"""The dense export: loads where winnow is not, gives the compressed model's logits, looks like the source; cards and sharing."""

import json
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import winnow.checkpoint.export
from tests.conftest import pico
from tests.unit.test_checkpoint import IDS, build, logits, statistics, targets_of
from tests.unit.worlds import FITTED
from winnow.__main__ import main
from winnow.checkpoint.card import WITHOUT_WINNOW, Exported, card
from winnow.checkpoint.export import Checkpoint, affine_of, export_dense
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.measured import Measured
from winnow.checkpoint.share import measured_beside, share
from winnow.errors import InputError
from winnow.io.artifacts import Bundle, file_digest, write_json, write_manifest
from winnow.structures.base import STRUCTURES

REFUSED = ("affine_block", "split_affine")
WRITABLE = [(kind, {}) for kind in FITTED if kind not in REFUSED] + [("split_affine", {"light": "dropped"})]
ELSEWHERE = """
import sys
sys.modules["winnow"] = sys.modules["snakemake"] = None  # importing either raises
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, found = torch.tensor({ids}), {{}}
for path in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found[path] = model.eval()(input_ids=ids).logits
save_file(found, sys.argv[1])
"""


def elsewhere(folders: list[Path], out: Path) -> dict[str, torch.Tensor]:
    """Logits of model directories in a process that has neither winnow nor Snakemake."""
    command = [sys.executable, "-c", ELSEWHERE.format(ids=IDS.tolist()), str(out), *map(str, folders)]
    subprocess.run(command, check=True, env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    return load_file(out)


def test_exports_of_every_structure_load_without_winnow(saved, tmp_path):
    expected, uncompressed = {}, {}
    for family, (kind, options) in product(["llama", "gpt2"], WRITABLE):
        source, out = saved(family), tmp_path / family / f"{kind} dense"
        dense = load_file(source / "model.safetensors")
        checkpoint = build(source, tmp_path / family / kind, targets_of(kind), 0.6, kind, **options)
        export_dense(checkpoint, out, {})
        expected[str(out)] = logits(load_model(checkpoint, "float32", "cpu"))
        uncompressed[str(out)] = logits(load_model(source, "float32", "cpu"))
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(out / "model.safetensors").items()}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in dense.items()}, "tied ones once, biases too"
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        stored = Bundle(out / "manifest.json").manifest["model_stored_bytes"]
        assert stored == sum(tensor.nbytes for tensor in dense.values())
    found = elsewhere([Path(path) for path in expected], tmp_path / "logits.safetensors")
    assert len(found) == 2 * len(WRITABLE)
    for path, there in found.items():
        torch.testing.assert_close(there, expected[path], atol=1e-5, rtol=0, msg=lambda m, path=path: f"{path}: {m}")
        assert float((there - uncompressed[path]).abs().max()) > 1e-3, "compressed, not the source"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dense_model_is_refused_by_name(saved_llama, tmp_path, kind):
    checkpoint = build(saved_llama, tmp_path, ["ffn"], 0.6, kind)
    with pytest.raises(InputError, match=rf"model\.layers\.0\.mlp\.act_fn: {kind} replaces the FFN's activation"):
        export_dense(checkpoint, tmp_path / "dense", {})
    assert STRUCTURES.build({"kind": kind}).not_dense()


def test_left_out_neurons_come_back_as_zeros_and_kept_ones_as_they_are(saved_llama, tmp_path):
    checkpoint = build(saved_llama, tmp_path, ["ffn"], 0.6, "neuron_slice")
    export_dense(checkpoint, tmp_path / "dense", {})
    stored, dense = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    kept = len(stored[up])
    assert torch.equal(dense[up][:kept], stored[up])
    assert torch.equal(dense[down][:, :kept], stored[down])
    assert not dense[up][kept:].any()
    assert not dense[down][:, kept:].any()
    assert kept < len(dense[up])


@pytest.fixture(scope="module")
def in_half(tmp_path_factory) -> tuple[Path, Path]:
    """(A model stored in bfloat16 but for a norm, its checkpoint), which computes in float32."""
    folder = tmp_path_factory.mktemp("half")
    model = pico("llama").to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(folder / "source")
    return folder / "source", build(folder / "source", folder / "work", ["ffn"], 0.6)


NAME = "model.layers.0.mlp.gate_proj"


def product_of(checkpoint: Path) -> torch.Tensor:
    stored = load_file(checkpoint / "model.safetensors")
    return stored[f"{NAME}.left.weight"].double() @ stored[f"{NAME}.right.weight"].double()


def test_an_export_is_as_large_as_the_original_and_says_what_rounding_costs(in_half, tmp_path):
    source, checkpoint = in_half
    made = export_dense(checkpoint, tmp_path / "dense", {})
    original, dense = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "dense"))
    assert {name: t.dtype for name, t in dense.items()} == {name: t.dtype for name, t in original.items()}
    assert made.bytes == sum(t.nbytes for t in original.values())
    product = product_of(checkpoint)
    assert torch.equal(dense[f"{NAME}.weight"], product.to(torch.bfloat16))
    assert torch.equal(dense["model.norm.weight"], original["model.norm.weight"])
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"
    manifest = Bundle(tmp_path / "dense" / "manifest.json").manifest
    assert (manifest["dtype"], manifest["rounding_error"]) == ("bfloat16", made.error)
    exact, near = [], []
    for name in (name for name in dense if ".mlp." in name):
        module, _ = Checkpoint(checkpoint).module(name.removesuffix(".weight"))
        exact.append((module.left.weight @ module.right.weight).detach().flatten())
        near.append(dense[name].double().flatten())
    assert made.error == pytest.approx(float((torch.cat(near) - torch.cat(exact)).norm() / torch.cat(exact).norm()), rel=1e-9)
    assert 5e-4 < made.error < 2**-8
    card_text = (tmp_path / "dense" / "README.md").read_text()
    assert f"stored in bfloat16, with a relative rounding error of {made.error:.1e}." in card_text


def test_in_float32_an_export_has_the_logits_of_its_checkpoint(in_half, tmp_path):
    """Products are rounded once, to the dtype asked for: a product of two bfloat16 factors in bfloat16 would be another model."""
    _, checkpoint = in_half
    made = export_dense(checkpoint, tmp_path / "dense", {}, dtype="float32")
    stored, dense = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(dense[f"{NAME}.weight"], product_of(checkpoint).float())
    untouched = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(dense[untouched], stored[untouched].float())
    assert {t.dtype for t in dense.values()} == {torch.float32}
    assert made.error < 1e-7
    one, other = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checkpoint, tmp_path / "dense"))
    torch.testing.assert_close(logits(other), logits(one), atol=1e-5, rtol=0)


def test_a_number_that_the_dtype_cannot_hold_is_named(saved_llama, tmp_path):
    source = tmp_path / "source"
    for where in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"):
        model = pico("llama")
        model.get_submodule(where).weight.data *= 1e7
        model.save_pretrained(source)
        checkpoint = build(source, tmp_path / where, ["ffn"], 0.6)
        with pytest.raises(InputError, match=rf"{where}.*: not finite as torch\.float16; use another --dtype"):
            export_dense(checkpoint, tmp_path / "dense", {}, dtype="float16")
        shutil.rmtree(tmp_path / "dense")
        shutil.rmtree(tmp_path / "source statistics")
        statistics.cache_clear()


def test_a_checkpoint_saved_again_and_one_in_shards_export_alike(saved_llama, tmp_path, monkeypatch):
    checkpoint = build(saved_llama, tmp_path / "work", ["ffn", "attention"], 0.6, "shared_basis")
    load_model(checkpoint, "float32", "cpu").save_pretrained(tmp_path / "again")
    export_dense(checkpoint, tmp_path / "dense", {})
    export_dense(tmp_path / "again", tmp_path / "dense again", {})
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "dense again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "dense again" / "README.md").exists(), "its recipe is not known any more"
    monkeypatch.setattr(winnow.checkpoint.export, "SHARD_BYTES", 50_000)
    export_dense(checkpoint, tmp_path / "sharded", {})
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").eval()
    assert torch.equal(logits(sharded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()))


def test_damaged_and_foreign_directories_are_refused_by_name(saved_llama, tmp_path):
    with pytest.raises(InputError, match="no quantization_config of winnow; it is not a compressed checkpoint"):
        Checkpoint(saved_llama)
    with pytest.raises(InputError, match=r"nowhere: no config\.json"):
        Checkpoint(tmp_path / "nowhere")
    checkpoint = build(saved_llama, tmp_path / "work", ["ffn"], 0.6)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors: changed since it was written"):
        Checkpoint(checkpoint)
    tensors.pop("model.layers.1.mlp.up_proj.left.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.left\.weight is missing"):
        Checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers["up_proj"].update(out=60), r"down_proj: its parts do not match"),
        (
            lambda layers: [layers[role].update({side: 97}) for role, side in SIDES],
            r"\(neuron_slice\) .* is 97 x 64, the dense",
        ),
    ],
)
def test_modules_that_are_no_part_of_the_dense_model_are_refused(saved_llama, tmp_path, change, message):
    """Shapes in the config and in the file that agree with each other, but not with the model."""
    checkpoint = build(saved_llama, tmp_path, ["ffn"], 0.6, "neuron_slice")
    config, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")
    layers = config["quantization_config"]["layers"]
    block = "model.layers.0.mlp."
    change({name.removeprefix(block): layout for name, layout in layers.items() if name.startswith(block)})
    for name in layers:
        tensors[f"{name}.weight"] = torch.zeros(layers[name]["out"], layers[name]["in"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=message):
        export_dense(checkpoint, tmp_path / "dense", {})


SIDES = (("gate_proj", "out"), ("up_proj", "out"), ("down_proj", "in"))


def test_a_map_is_found_by_unit_vectors_in_pieces_and_a_curve_is_refused(monkeypatch):
    monkeypatch.setattr(winnow.checkpoint.export, "COLUMNS", 3)
    linear = nn.Linear(7, 4).double()
    matrix, offset = affine_of(linear, 4, 7)
    torch.testing.assert_close(matrix, linear.weight.detach(), atol=1e-14, rtol=0)
    assert torch.equal(offset, linear.bias)
    with pytest.raises(ValueError, match="not an affine map"):
        affine_of(nn.Sequential(linear, nn.SiLU()), 4, 7)


PROTOCOL = {"protocol": "p1", "protocol_version": 1, "length": 8, "dtype": "float32"}
RESULT = {
    **{"nll": 2.5, "nll_se": 0.1, "perplexity": 12.2, "windows": 3, "tokens": 24, "per_window": {}},
    **{"protocol": PROTOCOL, "text": {"bos": False, "text_tokens": 99, "text_digest": "a" * 64}},
}
DELTA = {"delta_nll": 0.25, "delta_nll_se": 0.01}
LOSS = {**DELTA, "kl": 0.3, "top1_agreement": 0.875}


@pytest.fixture
def results(saved_llama, tmp_path) -> Path:
    """A checkpoint where the workflow would put it, with an evaluation beside it; returns the budget's folder."""
    budget = tmp_path / "m-000000" / "c-000000" / "s-000000" / "b-000000"
    build(saved_llama, budget, ["ffn"], 0.6)
    dense = tmp_path / "m-000000" / "dense" / "e-000000.json"
    write_json(dense, RESULT, {})
    inputs = {"x/checkpoint/manifest.json": file_digest(budget / "checkpoint" / "manifest.json"), "x/dense": file_digest(dense)}
    write_json(budget / "none-000000" / "e-000000.json", RESULT | LOSS, {"inputs": inputs})
    return budget


@pytest.fixture
def recipe() -> dict:
    return {
        "names": {"model": "m"},
        "winnow": "0.1.0",
        "model": {"source": "org/name", "revision": "f" * 40},
        "calibration": {"text": "train", "windows": 5, "length": 16, "seed": 3},
        "calibration_text": {"dataset": "org/text", "split": "train", "revision": "e" * 40},
        "method": {"structure": {"kind": "low_rank"}, "metric": {"kind": "mean_abs", "alpha": 0.5}},
        "budget": {"targets": ["ffn"], "keep_bytes": 0.5, "rank": None},
        "sizes": {"000.up_proj": 3, "001.up_proj": 4, "000.down_proj": 5},
        **{"stored_bytes": 5, "dense_bytes": 10, "model_stored_bytes": 15, "model_dense_bytes": 20},
    }


def test_a_card_holds_recipe_bytes_loading_and_numbers(recipe):
    text = card(recipe, [Measured("wiki", RESULT | LOSS, RESULT)])
    for piece in (
        "base_model: org/name",
        f"`org/name`, revision `{'f' * 40}`",
        "`mean_abs` (alpha 0.5)",
        "keep_bytes 0.5",
        f"train: org/text train, revision `{'e' * 40}`",
        "5 of 16 tokens, seed 3",
        "up_proj 3 to 4 (2x); down_proj 5 (1x)",
        "5 of 10 (50.00%)",
        "15 of 20",
        "import winnow",
        "| wiki | dense | 2.5000 ± 0.1000 | | 12.200 | | |",
        "|  | compressed | 2.5000 ± 0.1000 | 0.2500 ± 0.0100 | 12.200 | 0.3000 | 87.5% |",
        "3 windows of 8 tokens, 24 scored, in float32, without a leading BOS",
    ):
        assert piece in text, piece
    exported = card(recipe, exported=Exported(21, "bfloat16", 0.0021, "written as a dense model", WITHOUT_WINNOW, ""))
    assert "compressed by winnow, written as a dense model" in exported
    assert "import winnow" not in exported
    assert "winnow export" in exported, "how the numbers come in"
    assert "base_model" not in card(recipe | {"model": {"source": "a/folder", "revision": None}})


def test_a_hub_reads_the_measured_numbers_of_a_card(recipe, tmp_path):
    hub = {"dataset": "org/text", "subset": "raw", "split": "test", "revision": "e" * 40}
    local = {"dataset": None, "files": ["/a/folder/text.jsonl"], "split": None, "revision": None}
    measured = [Measured("wiki", RESULT | LOSS, RESULT, "wikitext", hub), Measured("own", RESULT | DELTA, RESULT, "mine", local)]
    (tmp_path / "README.md").write_text(card(recipe, [*measured, Measured("bare", RESULT | DELTA, RESULT)]))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.base_model, data.model_name) == ("transformers", "org/name", "m")
    facts = {"protocol": "p1 version 1", "length": 8, "windows": 3, "tokens": 24, "dtype": "float32"}
    task, asked = {"task_type": "text-generation"}, {"metric_args": {"evaluation": "wiki", **facts}}
    asked |= {"dataset_type": "org/text", "dataset_name": "wikitext", "dataset_config": "raw", "dataset_split": "test"}
    asked |= {"dataset_revision": "e" * 40}
    perplexity = {"metric_type": "perplexity", "metric_name": "perplexity", "metric_value": 12.2}
    assert data.eval_results[0] == EvalResult(**task, **asked, **perplexity)
    found = {result.metric_type: result for result in data.eval_results if result.dataset_name == "wikitext"}
    values = {"perplexity": 12.2, "loss": 2.5, "loss_above_dense": 0.25, "kl_divergence": 0.3, "top1_agreement": 0.875}
    assert {kind: result.metric_value for kind, result in found.items()} == values
    assert found["loss"].metric_args["standard_error"] == 0.1
    others = [(r.dataset_type, r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results[5:]]
    assert others == [(n, n, kind, values[kind]) for n in ("mine", "bare") for kind in list(values)[:3]]
    (tmp_path / "README.md").write_text(card(recipe))
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_a_shared_folder_is_the_checkpoint_with_its_numbers(results, tmp_path):
    measured = measured_beside(results / "checkpoint")
    assert [m.evaluation for m in measured] == ["e"]
    share(results / "checkpoint", tmp_path / "shared", measured)
    assert "0.2500 ± 0.0100" in (tmp_path / "shared" / "README.md").read_text()
    Bundle(tmp_path / "shared" / "manifest.json").verify()
    one, other = (load_file(folder / "model.safetensors") for folder in (results / "checkpoint", tmp_path / "shared"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    Bundle(results / "checkpoint" / "manifest.json").verify()


PLACES = ("/home/someone/models/mine", "~/models/mine", "C:\\Users\\someone\\mine", "/scratch/mine/tokenizer.json")


def test_an_export_and_a_shared_folder_name_no_place(saved_llama, tmp_path):
    """Neither those that transformers wrote into the source's files, nor those that an older winnow wrote into its own."""
    source = shutil.copytree(saved_llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": PLACES[0], "more": {"_name_or_path": PLACES[1]}}))
    about = {"name_or_path": PLACES[2], "tokenizer_file": PLACES[3], "bos_token": "/s", "chat_template": "/{{ x }}\n/a/b"}
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    (source / "generation_config.json").write_text(text := '{"eos_token_id":  0}')
    checkpoint = build(source, tmp_path / "work", ["ffn"], 0.6)
    written = {path.name: path.read_text() for path in checkpoint.iterdir() if path.suffix != ".safetensors"}
    assert not any(place in text for place in PLACES for text in written.values())
    assert written["generation_config.json"] == text, "what names no place is copied byte by byte"
    kept = {key: about[key] for key in ("bos_token", "chat_template")}
    assert json.loads(written["tokenizer_config.json"]) == kept

    recipe = yaml.safe_load(written["recipe.yaml"])
    recipe["model"] = {"source": PLACES[0], "revision": None}
    recipe["calibration"] = {"text": "train", "windows": 5, "length": 16, "seed": 3}
    recipe["calibration_text"] = {"files": ["/data/texts/one.txt", "texts/two.txt"]}
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads(written["config.json"]) | {"_name_or_path": PLACES[0]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(about))
    (checkpoint / "recovery.json").write_text(json.dumps({"from": PLACES[0], "held_out": 0.1}))
    write_manifest(checkpoint, {}, {"params": {"spec": {"presets": {"model": {"source": PLACES[0]}}}}})
    share(checkpoint, tmp_path / "shared", [])
    export_dense(checkpoint, tmp_path / "dense", {})
    for path in [*(tmp_path / "shared").iterdir(), *(tmp_path / "dense").iterdir()]:
        for place in (*PLACES, "someone", "/data/texts"):
            assert place.encode() not in path.read_bytes(), path
    Bundle(tmp_path / "shared" / "manifest.json").verify()
    for folder in ("shared", "dense"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "| model | `mine` |" in text
        assert "| calibration text | train: one.txt, texts/two.txt |" in text
        assert yaml.safe_load((tmp_path / folder / "recipe.yaml").read_text())["model"]["source"] == "mine"
    assert json.loads((tmp_path / "shared" / "recovery.json").read_text()) == {"from": "mine", "held_out": 0.1}
    assert torch.equal(
        logits(load_model(tmp_path / "shared", "float32", "cpu")), logits(load_model(checkpoint, "float32", "cpu"))
    )
    (checkpoint / "tokenizer_config.json").write_text("[1]")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not a JSON object"):
        export_dense(checkpoint, tmp_path / "other", {})


def test_numbers_of_another_checkpoint_are_left_out(results, tmp_path):
    write_json(results.parents[2] / "dense" / "e-000000.json", RESULT | {"nll": 3.0}, {})
    assert measured_beside(results / "checkpoint") == [], "compared with another dense evaluation"
    alone = shutil.copytree(results / "checkpoint", tmp_path / "alone" / "checkpoint")
    assert measured_beside(alone) == []


def test_the_commands(results, tmp_path, monkeypatch, capsys):
    """`python -m winnow export` and `share`, which a user has who has only the checkpoint."""
    for command, said in (("export", "dense, does not need winnow"), ("share", "loads with winnow")):
        monkeypatch.setattr(sys, "argv", ["winnow", command, str(results / "checkpoint"), str(tmp_path / command)])
        main()
        assert f"{said}; 1 evaluations in its card" in capsys.readouterr().out
        assert "0.2500 ± 0.0100" in (tmp_path / command / "README.md").read_text()
        with pytest.raises(SystemExit, match=rf"winnow: .*{command}: exists already; use a new directory"):
            main()
    command = ["winnow", "export", "--dtype", "bfloat16", str(results / "checkpoint"), str(tmp_path / "half")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    said = capsys.readouterr().out
    assert re.search(
        r"half: [\d,]+ bytes, in bfloat16 with a relative rounding error of \d\.\de-04; dense, does not need winnow", said
    )
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
