"""Embeddings and head as targets of rounding: statistics, predicted losses, checkpoints of tied and untied ones, refusals."""

import copy
import json
from functools import cache
from unittest.mock import Mock

import pandas as pd
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, log_softmax, one_hot
from transformers import AutoModel, AutoModelForCausalLM

import winnow
from tests.conftest import ROOT, TINY, VOCABULARY, pico
from tests.unit.test_recovery import JOB, KINDS, files_of, run
from winnow.allocation.groups import chosen_groups
from winnow.allocation.rounds import Held, Setting, around, predict_in_rounds
from winnow.calibration.outer import collect_outer, frequencies
from winnow.calibration.reader import Held as Given
from winnow.calibration.statistics import collect
from winnow.checkpoint.export import Checkpoint, export_dense
from winnow.checkpoint.layouts import install
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.packed import export_packed
from winnow.checkpoint.streaming import Streamed
from winnow.engines.gguf.matrices import Matrices
from winnow.engines.vllm.checked import described
from winnow.errors import InputError
from winnow.factors.fit import fit_groups, storable
from winnow.io.artifacts import MANIFEST, Bundle
from winnow.metrics.base import METRICS
from winnow.models import architectures
from winnow.models.architectures import outer_of
from winnow.models.held import HeldModel
from winnow.models.shape import shape_of
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.forecast import forecast
from winnow.planning.plan import Plan
from winnow.recovery.recover import write_recovered
from winnow.structures.base import STRUCTURES

WINDOWS = torch.randint(1, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(3))
OUTER = ["embeddings", "head"]
ALL = ["ffn", "attention", *OUTER]
TIED = {"gemma3_text": "model.embed_tokens"}
UNTIED = {"qwen3": ("model.embed_tokens", "lm_head")}


def rounded(bits, **options):
    return {"structure": {"kind": "rounded", "bits": [bits], "group": 16, **options}, "metric": {"kind": "gram"}}


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")


@cache
def statistics(name):
    """({role: statistics}, the model)"""
    model = pico(name).double()
    found = collect_outer(model, HeldModel(model).outer, WINDOWS, 5, torch.float64, "model", 0)
    return {role: values for _, roles in found for role, values in roles.items()}, model


def logits(model):
    with torch.no_grad():
        return model.eval()(WINDOWS[:3]).logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_statistics_are_those_of_the_loss(name):
    """Of the head: the second moment of its inputs, and the curvature of the loss in its outputs, here from all labels by their
    probability; also where logits are capped. Of the embeddings: the gradients in the matrix, also where it is scaled."""
    found, model = statistics(name)
    kept = {}
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _m, args, output: kept.update(x=args[0], z=output))
    few = WINDOWS[:1, :4]
    with torch.no_grad():
        model(WINDOWS)
        x = kept["x"].flatten(0, 1)
        model(few)
    z = kept["z"].requires_grad_()
    cap = model.config.final_logit_softcapping if name == "gemma2" else None
    capped = cap * torch.tanh(z / cap) if cap else z
    p = torch.softmax(capped, -1)
    slope = torch.autograd.grad(capped.sum(), z)[0]
    by_label = torch.stack([(p - one_hot(torch.tensor(y), VOCABULARY)) * slope for y in range(VOCABULARY)])  # (y, 1, t, i)
    by_hand = (p.movedim(-1, 0)[..., None] * by_label.square()).sum(0)[0].mean(0)
    hook.remove()
    matrices = HeldModel(model).outer
    own = {k: v for _, roles in collect_outer(model, matrices, few, 1, torch.float64, "model", 0) for k, v in roles.items()}
    torch.testing.assert_close(own["lm_head"]["gradient_gram"], by_hand.detach(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found["lm_head"]["gram"], x.T @ x / len(x))
    one = torch.arange(1, 9)[
        None
    ]  # without the one of padding; every token once: the rows of the matrix's gradient are those of its tokens
    own = {k: v for _, roles in collect_outer(model, matrices, one, 1, torch.float64, "text", 0) for k, v in roles.items()}
    untied, embeddings = copy.deepcopy(model), model.get_input_embeddings()
    untied.get_input_embeddings().weight = torch.nn.Parameter(embeddings.weight.detach().clone())
    loss = cross_entropy(untied(one).logits[0, :-1], one[0, 1:], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, untied.get_input_embeddings().weight)
    torch.testing.assert_close(own["embed_tokens"]["gram"], gradient.T @ gradient / 8, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_families_have_the_modules_that_transformers_names(name):
    class_name, options = TINY[name]
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        model = cls(cls.config_class(**options))
    tied = model.all_tied_weights_keys
    found = outer_of(model.config.model_type, {n: {"shape": list(t.shape)} for n, t in model.state_dict().items()}, tied)
    if name.startswith(("bert", "roberta")) or name == "gemma3":
        assert not found
        return
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    named = [m.module for m in found] + [m.head for m in found if m.head]
    assert [model.get_submodule(part) for part in named] == modules
    assert [m.role for m in found] == (["tied"] if "lm_head.weight" in tied else ["embed_tokens", "lm_head"])


def test_tokens_that_were_not_seen_have_a_frequency():
    seen = torch.tensor([5.0, 1.0, 1.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    found = frequencies(seen)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[4]) == float(found[5]) == pytest.approx(2 / 11 / 2)
    assert torch.equal(frequencies(torch.tensor([1.0, 3.0])), torch.tensor([0.25, 0.75]))
    assert (frequencies(torch.tensor([4.0, 0.0])) > 0).all(), "also if no token was seen only once"


@pytest.mark.parametrize(("name", "targets"), [("llama", ["head"]), ("qwen3", ["embeddings"]), ("qwen3", ["head"])])
def test_the_predicted_loss_is_the_divergence_of_the_model(name, targets):
    """Exactly what the two roles add up to, and on its own tokens near what the model loses, in nats."""
    model = pico(name)
    made = winnow.compress(
        model, WINDOWS, {**rounded(4), "allocation": {"kind": "ilp", "leave_dense": False}}, 0.4, targets=targets, nearest=True
    )
    found, _ = statistics(name)
    (group,) = made.report.groups
    roles = ["embed_tokens", "lm_head"] if name == "llama" else [group["group"].partition(".")[2]]
    module = made.model.get_input_embeddings() if "embeddings" in targets or name == "llama" else made.model.lm_head
    dense = model.get_input_embeddings() if "embeddings" in targets or name == "llama" else model.lm_head
    change = (module.matrix() - dense.weight.detach()).double()
    by_hand = sum(float(((change @ found[r]["gram"]) * change).sum(1) @ found[r]["gradient_gram"]) / 2 for r in roles)
    assert made.report.predicted == pytest.approx(by_hand, rel=0.05), "apart from the expectation for other text"
    with torch.no_grad():
        before, after = (log_softmax(m(WINDOWS).logits.double(), -1) for m in (model, made.model))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.7 < divergence / made.report.predicted < 1.4


@pytest.mark.parametrize("name", [*TIED, *UNTIED])
def test_checkpoints_hold_every_matrix_once(name, tmp_path):
    """Bytes by hand, files, reload, a second save, other classes, generation, the dense export and block by block."""
    model = pico(name)
    made = winnow.compress(model, WINDOWS, rounded(5, rounding="feedback"), 0.4, targets=ALL, nearest=True)
    folder = made.save(tmp_path / "checkpoint")
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    outer = [TIED[name]] if name in TIED else UNTIED[name]
    for module in outer:
        m, n = model.get_submodule(module).weight.shape
        assert sum(t.nbytes for key, t in stored.items() if key.startswith(f"{module}.")) == m * (n * 5 // 8 + 2 * (n // 16))
    assert (name in TIED) == ("tied" in config["layers"]["lm_head"])
    assert (name in TIED) == (not any(key.startswith("lm_head") for key in stored))
    assert config["format_version"] == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model_stored_bytes"] == sum(t.nbytes for t in stored.values())
    assert made.report.dense_bytes == 4 * sum(m.shape[0] * m.shape[1] + m.shape[0] * m.bias for m in HeldModel(model).every)
    loaded = load_model(folder, "float32", "cpu")
    assert torch.equal(logits(loaded), logits(made.model))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() - {"lm_head.weight"} == stored.keys() - {"lm_head.weight"}, "of a tied one an empty tensor"
    assert sum(t.nbytes for t in again.values()) == manifest["model_stored_bytes"]
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base.eval()(WINDOWS[:1]).last_hidden_state, loaded.base_model(WINDOWS[:1]).last_hidden_state)
    assert loaded.generate(WINDOWS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)
    assert logits(copy.deepcopy(loaded).bfloat16()).dtype == torch.bfloat16
    export_dense(folder, tmp_path / "export", {})
    assert torch.equal(logits(load_model(tmp_path / "export", "float32", "cpu")), logits(loaded))
    streamed = Streamed(folder, "float32", "cpu", tmp_path / "artefact", 32)
    for layer in streamed.remaining():
        with streamed.block(layer):
            streamed.run(0, {"input_ids": WINDOWS[:1]})
        streamed.advance(layer)
    with streamed.passed():
        torch.testing.assert_close(streamed.logits(0, WINDOWS[0], slice(0, 32)), logits(loaded)[0], rtol=1e-5, atol=1e-6)


def test_rows_of_tokens_that_were_not_seen_are_rounded_as_well(monkeypatch):
    """Also when a few rows are fitted at a time, which changes no code."""
    windows, model = WINDOWS % 64 + 1, pico("llama")
    method = rounded(3, rounding="feedback", grids=["asymmetric"])
    made = [winnow.compress(model, windows, method, 0.4, targets=OUTER, nearest=True)]
    monkeypatch.setattr(architectures, "AT_ONCE", 100 * 64)
    made.append(winnow.compress(model, windows, method, 0.4, targets=OUTER, nearest=True))
    own, parts = (one.model.get_input_embeddings() for one in made)
    assert torch.equal(own.steps, parts.steps)
    assert torch.equal(own.zero, parts.zero)
    assert made[1].report.groups[0]["relative_error"] == pytest.approx(made[0].report.groups[0]["relative_error"])
    error = (own.matrix() - model.get_input_embeddings().weight.detach()).square().sum(1)
    energy = model.get_input_embeddings().weight.detach().square().sum(1)
    shares = [float(error[some].sum() / energy[some].sum()) for some in (slice(1, 65), slice(65, None))]
    assert shares[1] < 1.1 * shares[0]


def test_many_bits_change_nothing_and_many_forms_are_chosen_from():
    """8 bits in groups of four reproduce the logits; a mixture has forms of all matrices; what is no target stays dense."""
    model = pico("qwen3")
    made = winnow.compress(model, WINDOWS, rounded(8, group=4), 0.5, targets=ALL, nearest=True)
    torch.testing.assert_close(logits(made.model), logits(model), rtol=0, atol=2e-2)
    members = [{"kind": "low_rank"}, {"kind": "rounded", "bits": [2, 3, 4, 6, 8]}]
    mixed = {"structure": {"kind": "mixed", "members": members}, "metric": {"kind": "two_sided"}, "allocation": {"kind": "ilp"}}
    made = winnow.compress(model, WINDOWS, mixed, 0.2, targets=ALL)
    assert {row["group"].partition("@")[0] for row in made.report.groups} >= {"000.embed_tokens", "001.lm_head"}
    assert made.report.keep_bytes == pytest.approx(0.2, abs=0.005)
    made = winnow.compress(model, WINDOWS, rounded(4), 0.4, targets=["head"], nearest=True)
    assert type(made.model.get_input_embeddings()) is torch.nn.Embedding
    parts = {"attention": {"kind": "low_rank"}, "head": {"kind": "rounded", "bits": [4], "group": 16}}
    several = {"structure": {"kind": "by_target", "parts": parts}, "metric": {"kind": "gram"}}
    made = winnow.compress(model, WINDOWS, several, 0.35, targets=["attention", "head"], nearest=True)
    assert type(made.model.lm_head).__name__ == "RoundedLinear"


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_exports_to_engines(name, tmp_path):
    """llama.cpp's blocks have the numbers of the checkpoint; compressed-tensors has no embeddings, but heads."""
    model, group = pico(name), {"group": 32}
    folder = winnow.compress(model, WINDOWS, rounded(5, **group), 0.4, targets=OUTER, nearest=True).save(tmp_path / "all")
    for stored in Matrices(Checkpoint(folder), in_blocks=False).rounded_outer():
        values = stored.content.codes * stored.content.scales.repeat_interleave(32, 1)
        loaded = load_model(folder, "float32", "cpu").get_submodule(stored.matrix.module)
        assert torch.equal(values, loaded.matrix())
    with pytest.raises(InputError, match="the format has no rounded embeddings; use --format dense or gguf"):
        export_packed(folder, tmp_path / "packed", None)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    if name == "llama":
        with pytest.raises(InputError, match=r"vLLM does not run a compressed model\.embed_tokens; load the checkpoint with tr"):
            described(model.config, quantization)
    if name == "gpt_neox":
        made = winnow.compress(model, WINDOWS, rounded(4, **group), 0.4, targets=["head"], nearest=True)
        export_packed(made.save(tmp_path / "head"), tmp_path / "of the head", None)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "of the head")
        torch.testing.assert_close(logits(packed), logits(made.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("embed", {"embeddings": None}, "names model.embed_tokens, which is not a compressible matrix"),
        ("embed", {"kind": "low_rank", "rank": 2}, "names model.embed_tokens, which is not a compressible matrix"),
        ("embed", {"out": 5}, "does not fit the model: it has 5 x 64 numbers, not 1024 x 64"),
        ("head", {"tied": "model.norm"}, "model.norm are no rounded embeddings"),
        ("head", {"embeddings": True}, "names lm_head, which is not a compressible matrix"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(name, change, message, tmp_path):
    embed = {"kind": "rounded", "out": 1024, "in": 64, "bits": 4, "group": 16, "embeddings": True}
    layers = {"model.embed_tokens": embed, "lm_head": {"kind": "rounded", "out": 1024, "in": 64, "tied": "model.embed_tokens"}}
    layout = layers["model.embed_tokens" if name == "embed" else "lm_head"]
    layout.update(change)
    if name == "embed" and "kind" in change:
        del layout["embeddings"]
    with torch.device("meta"):
        model = type(pico("llama"))(pico("llama").config)
    with pytest.raises(InputError, match=message):
        install(model, layers)


def planned(method="rounded_gram", budget=None, **model):
    content = copy.deepcopy(default())
    content["models"]["demo"] |= model
    content["budgets"] = {"all-0.3": {"targets": ["ffn", "attention"], "keep_bytes": 0.3}}
    content["budgets"]["every"] = {"targets": ALL, "keep_bytes": 0.3, **(budget or {})}
    content["experiments"] = {"demo": content["experiments"]["demo"] | {"methods": [method], "budgets": ["all-0.3", "every"]}}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (planned("whitened"), r"low_rank \(whitened\) does not apply to 'embeddings', a target of budget 'every'"),
        (planned(load="stream"), "whose statistics need the whole model, but 'demo' has `load: stream`"),
        (planned(budget={"allocation": {"kind": "ilp", "time": {"keep": 1.0}}}), "whose time is not measured; remove `time`"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(content, message):
    with pytest.raises(InputError, match=message):
        load(content)


def test_a_metric_without_statistics_of_embeddings_is_refused():
    content = planned("mine")
    content["methods"]["mine"] = {**rounded(4), "metric": {"kind": "mean_abs"}}
    with pytest.raises(InputError, match="there is no mean_abs, as the metric of 'mine' needs; use one of gram, "):
        load(content)


def test_only_budgets_with_these_targets_ask_for_their_statistics():
    plan = Plan(load(planned()), ROOT)
    presets = {"models": "demo", "calibrations": "demo", "methods": "rounded_gram"}
    model, calibration, method = (plan.labels[section][name] for section, name in presets.items())
    shards = plan.paths.of_members(model, calibration, method, "factors/{shard}/manifest.json")
    assert [path.split("/")[-2] for path in shards] == ["1-of-1", "outer"]
    shape = {"demo": shape_of(ROOT / plan.config.models["demo"].source)}
    works = {w.stage: w for w in forecast(plan, shape)}
    assert works["collect_outer"].jobs == 1
    assert works["factorize"].jobs == 2
    content = planned()
    content["experiments"]["demo"]["budgets"] = ["all-0.3"]
    without = Plan(load(content), ROOT)
    assert without.labels["methods"]["rounded_gram"] == method
    assert len(without.paths.of_members(model, calibration, method, "factors/{shard}/manifest.json")) == 1
    assert "collect_outer" not in {w.stage for w in forecast(without, shape)}


def test_recoveries_leave_embeddings_and_tied_heads_as_they_are(saved, tmp_path):
    source = saved("llama")
    folder = winnow.compress(source, WINDOWS, rounded(3), 0.2, targets=ALL, nearest=True).save(tmp_path / "checkpoint")
    files, checkpoint = files_of(source, tmp_path), Bundle(folder / MANIFEST)
    given, report = run(files, checkpoint, {**KINDS["distill"], "rounded": "codes"})
    write_recovered(tmp_path / "recovered", files, checkpoint, given, {}, report, JOB)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "recovered"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith(("model.embed_tokens", "lm_head")) for name in changed)


def test_an_adapter_can_be_merged_into_a_rounded_head(tmp_path):
    """An export has both, unless the head is tied."""
    model = pico("qwen3")
    folder = winnow.compress(model, WINDOWS, rounded(4), 0.4, targets=OUTER, nearest=True).save(tmp_path / "checkpoint")
    adapted = peft.get_peft_model(load_model(folder, "float32", "cpu"), peft.LoraConfig(target_modules="lm_head", r=2))
    with torch.no_grad():
        adapted.base_model.model.lm_head.lora_B["default"].weight.normal_()
    merged = adapted.merge_and_unload()
    assert not torch.allclose(logits(merged), logits(load_model(folder, "float32", "cpu")), atol=0.1)
    merged.save_pretrained(tmp_path / "merged")
    export_dense(tmp_path / "merged", tmp_path / "dense", {})
    torch.testing.assert_close(logits(load_model(tmp_path / "dense", "float32", "cpu")), logits(merged), rtol=1e-4, atol=1e-4)
    layers = {"lm_head": {"kind": "rounded", "out": 1024, "in": 64, "tied": "model.embed_tokens", "added": 2}}
    tied = Mock(layouts=layers, directory="here", dense=pico("llama"))
    with pytest.raises(InputError, match="here: lm_head: an adapter was merged into the tied head"):
        Checkpoint.outer(tied)


def test_losses_are_predicted_again_around_the_compressed_model(saved, tmp_path):
    source = saved("llama")
    files, structure = files_of(source, tmp_path), STRUCTURES.build(rounded(4)["structure"] | {"bits": [3, 6]})
    setting = Setting(WINDOWS, 4, "float32", "cpu", torch.float64, True, "model", 0)
    model, factors, rows = load_model(source, "float32", "cpu"), {}, {}
    moments = Held(collect(model, files.matrices, WINDOWS, 4, torch.float64))
    outer = Held(collect_outer(model, files.outer, WINDOWS, 4, torch.float64, "model", 0))
    metric = METRICS.build({"kind": "gram"})
    for shard, statistics_of in (("1-of-1", moments), ("outer", outer)):
        for name, fit, numbers in fit_groups(files, statistics_of, None, {}, structure, metric, shard, "cpu"):
            factors[name] = Given({f"{name}.safetensors": {**storable(structure, fit), "numbers": torch.tensor(numbers)}})
            rows[name] = {"numbers": numbers, "error": fit.error.tolist()}
    predicted = pd.DataFrame({"predicted": around(model, files, factors, structure, setting)}).map(lambda x: x.tolist())
    groups = chosen_groups(files, structure, ALL, pd.DataFrame.from_dict(rows, orient="index"), predicted)
    budget = {"keep_bytes": 0.14, "nearest": True, "allocation": {"kind": "ilp", "rounds": 1}}
    found, records = predict_in_rounds(files, factors, structure, groups, budget, 1, setting)
    assert [record["round"] for record in records] == [0, 1]
    assert min(found["000.tied"][1:]) > 0
