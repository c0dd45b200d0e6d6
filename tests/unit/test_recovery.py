"""Recovery: the loss on held-out windows falls, bytes stay, a killed job goes on with the same bits, what goes wrong is named."""

import atexit
import copy
import json
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import FAMILIES, ROOT, pico
from tests.unit.test_checkpoint import build
from winnow.allocation.rounds import Held
from winnow.calibration.gradients import collect_gradients
from winnow.checkpoint.hf import WinnowConfig
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.share import share
from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, Bundle, write_json
from winnow.io.resume import SECONDS, Resume
from winnow.jobs.start import Job
from winnow.models.architectures import matrices_of
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.numerics.linalg import leading_directions
from winnow.planning.cells import Cell
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.plan import Plan
from winnow.recovery import refine, sequential
from winnow.recovery.base import RECOVERIES, recovery_of
from winnow.recovery.blocks import Passage, outputs_of
from winnow.recovery.recover import given_of, write_recovered
from winnow.recovery.training import Progress, batches, share_of_peak

WINDOWS = torch.randint(0, 64, (60, 12), generator=torch.Generator().manual_seed(5))
SHORT = {"steps": 12, "batch": 8, "every": 6, "rate": 1e-3}
KINDS = {
    "refine": {"kind": "refine", **SHORT},
    "shifted": {"kind": "refine", "objective": "shifted", "norms": True, **SHORT},
    "distill": {"kind": "distill", **SHORT},
    "nll": {"kind": "distill", "nll": 0.5, **SHORT},
    "sequential": {"kind": "sequential"},
    "sequential_shifted": {"kind": "sequential", "objective": "shifted"},
    "weighted": {"kind": "sequential", "objective": "shifted", "outputs": "gradient"},
    "biases": {"kind": "sequential", "biases": "fitted"},
    "lora": {"kind": "distill", "parameters": "lora", "lora_rank": 4, **SHORT},
}
TRAINED = [name for name, options in KINDS.items() if "steps" in options]
JOB = Job({"dtype": "float32"}, "cpu", {"rule": "recover", "params": {}, "inputs": {}, "wildcards": {}})
KEY = {"rule": "recover", "params": {"spec": {"a": 1}}, "inputs": {}, "wildcards": {}}


def files_of(source, folder) -> ModelFiles:
    write_json(folder / "model.json", describe(source))
    return ModelFiles(folder / "model.json")


def run(files, checkpoint, options, resume=None, change=lambda given: None, windows=WINDOWS):
    """(what was given, after its recovery; the report)"""
    gradients = gradients_of(files.directory) if recovery_of(options).options.reads_gradients else None
    given = given_of(files, checkpoint, windows, recovery_of(options).options, True, "cpu", resume, gradients)
    change(given)
    return given, recovery_of(options).recover(given)


@cache
def gradients_of(directory: Path) -> Held:
    """Statistics of gradients of a dense model, as the rule collects them."""
    model, known = load_model(directory, "float32", "cpu"), describe(directory)
    matrices = matrices_of(known["model_type"], known["tensors"])
    return Held(collect_gradients(model, matrices, WINDOWS, 20, torch.float64, "model", 0))


def losses(report) -> list[tuple[float, float]]:
    """(held-out loss at the start, and of what is kept) of every training in a report."""
    if "divergence" in report:  # the model is judged, not its blocks
        return [(report["divergence"]["held_out_start"], report["divergence"]["held_out_best"])]
    rows = report["blocks"].values() if "blocks" in report else [report]
    return [(row["held_out_start"], row["held_out_best"]) for row in rows]


@cache
def compressed(family: str, kind: str = "low_rank") -> tuple[ModelFiles, Bundle]:
    """(model files, compressed checkpoint) of a tiny model; nothing changes them."""
    folder = Path(tempfile.mkdtemp(prefix=f"winnow-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pico(family).save_pretrained(folder / "model")
    checkpoint = build(folder / "model", folder / "work", ["ffn", "attention"], 0.4, kind, metric="gram")
    return files_of(folder / "model", folder), Bundle(checkpoint / MANIFEST)


@pytest.fixture
def llama():
    return compressed("llama")


ALL_FAMILIES = ("refine", "distill", "biases")
EVERYWHERE = [(family, name) for family in FAMILIES for name in KINDS if family == "llama" or name in ALL_FAMILIES]


@pytest.mark.parametrize(("family", "name"), EVERYWHERE)
def test_the_loss_falls_and_the_bytes_stay(family, name, tmp_path):
    files, checkpoint = compressed(family)
    given, report = run(files, checkpoint, KINDS[name])
    for start, best in losses(report):
        assert best < start
    write_recovered(tmp_path / "out", files, checkpoint, given, {"name": "mine", **KINDS[name]}, report, JOB)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.directory, tmp_path / "out"))
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    assert Bundle(tmp_path / "out" / MANIFEST).manifest["model_stored_bytes"] == checkpoint.manifest["model_stored_bytes"]
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    inside = {k for k in changed if k.startswith(tuple(f"{module}." for module in layers))}
    assert inside
    norms = changed - inside
    assert all(after[k].dim() == 1 for k in norms)
    assert bool(norms) == (name == "shifted"), "nothing else changes but by `norms`"
    loaded = load_model(tmp_path / "out", "float32", "cpu")
    with torch.no_grad():
        logits = [m(input_ids=WINDOWS[:2].long()).logits for m in (loaded, given.model)]
    assert torch.equal(*logits), "what is written is what was trained"
    share(tmp_path / "out", tmp_path / "shared", [])
    assert "recovery, on the calibration windows" in (tmp_path / "shared" / "README.md").read_text()


def test_refinement_lowers_what_distillation_looks_at(llama):
    """A model-wide check that no block's loss can fake: KL to the dense model on windows that nobody trained on."""
    files, checkpoint = llama
    fresh = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(99)).long()

    def kl(given) -> float:
        with torch.no_grad():
            q, p = (m(input_ids=fresh).logits.double().log_softmax(-1) for m in (given.model, given.dense))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = kl(given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["refine"]).options, True, "cpu"))
    refined, distilled = (kl(run(files, checkpoint, {**KINDS[n], "steps": 40})[0]) for n in ("refine", "distill"))
    assert refined < 0.95 * before
    assert distilled < 0.95 * before


def test_structures_with_shared_and_tied_factors_are_recovered(saved_llama, tmp_path):
    files = files_of(saved_llama, tmp_path)
    for kind in ("basis_sharing", "shared_basis", "coupled", "affine_block"):
        targets = ["attention"] if kind == "shared_basis" else ["ffn"]
        metric = {"metric": "gram"} if kind != "affine_block" else {}
        checkpoint = Bundle(build(saved_llama, tmp_path / kind, targets, 0.6, kind, **metric) / MANIFEST)
        for name in ("refine", "distill"):
            given, report = run(files, checkpoint, KINDS[name])
            assert all(best <= start for start, best in losses(report)), kind
            improved = any(best < start for start, best in losses(report))
            assert improved or kind == "affine_block", "which is a least-squares optimum already"
            write_recovered(tmp_path / kind / name, files, checkpoint, given, {"name": name, **KINDS[name]}, report, JOB)
            loaded = load_model(tmp_path / kind / name, "float32", "cpu")
            with torch.no_grad():
                logits = [m(input_ids=WINDOWS[:2].long()).logits for m in (loaded, given.model)]
            assert torch.equal(*logits), kind


@pytest.mark.parametrize("objective", ["anchored", "shifted"])
def test_what_layers_share_stays_and_the_other_factor_is_the_best_one(saved_llama, tmp_path, objective):
    """Basis Sharing: no other left factor of the first matrix makes a smaller error with the right one that all have."""
    files = files_of(saved_llama, tmp_path)
    checkpoint = Bundle(build(saved_llama, tmp_path / "shared", ["ffn"], 0.6, "basis_sharing", metric="gram") / MANIFEST)
    before = run(files, checkpoint, {"kind": "refine", "steps": 1})[0].dense
    start = given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["sequential"]).options, True, "cpu").model
    given, report = run(files, checkpoint, {**KINDS["sequential"], "objective": objective})
    assert any(best < at for at, best in losses(report))
    factors = [f"model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)]
    rights = [m.get_submodule(name).right.weight for m in (start, given.model) for name in factors]
    assert all(torch.equal(rights[0], right) for right in rights)
    caught = []
    hook = given.model.get_submodule(factors[0]).register_forward_pre_hook(lambda _m, a: caught.append(a[0]))
    with torch.no_grad():
        given.model(input_ids=given.split()[0].long())
    hook.remove()
    x = caught[0].flatten(0, 1).double()
    target = x @ before.get_submodule(factors[0]).weight.double().T
    basis = x @ rights[0].double().T
    left = given.model.get_submodule(factors[0]).left.weight.double()
    best = torch.linalg.lstsq(basis, target).solution.T
    error, least = ((basis @ w.T - target).norm() for w in (left, best))
    assert error <= 1.01 * least


class Killed(Exception):
    pass


class Fragile(Resume):
    """Dies after its first save."""

    saves = 0

    def save(self, done, sums):
        if self.saves:
            raise Killed
        super().save(done, sums)
        self.saves += 1

    def keep(self, part, tensors):
        if self.saves:
            raise Killed
        super().keep(part, tensors)
        self.saves += 1


@pytest.mark.parametrize("structure", ["low_rank", "basis_sharing"])
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_recovery_goes_on_with_the_same_bits(name, structure, tmp_path, monkeypatch):
    monkeypatch.setenv(SECONDS, "0")
    files, checkpoint = compressed("gpt2" if name == "biases" else "llama", structure)
    options = KINDS[name] | ({"steps": 13} if name in TRAINED else {})  # looks at 6, 12 and 13
    whole, report = run(files, checkpoint, options)
    with pytest.raises(Killed):
        run(files, checkpoint, options, Fragile(tmp_path / "artefact", KEY))
    calls = []

    def count(given):
        given.dense.register_forward_hook(lambda *_: calls.append(1))
        block = given.dense.get_submodule(given.blocks[0])
        block.register_forward_hook(lambda *_: calls.append(1))

    again, second = run(files, checkpoint, options, Resume(tmp_path / "artefact", KEY), count)
    states = [given.model.state_dict() for given in (whole, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert report == second
    full = []
    run(files, checkpoint, options, None, lambda given: given.dense.register_forward_hook(lambda *_: full.append(1)))
    if KINDS[name]["kind"] == "distill":
        assert 0 < len(calls) < 2 * len(full), "the steps that were saved are not done again"


def test_the_same_seed_gives_the_same_bits_and_another_does_not(llama):
    files, checkpoint = llama
    for name in ("refine", "distill", "lora"):
        a, b, c = (run(files, checkpoint, {**KINDS[name], "steps": 4, "seed": seed})[0].model.state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("name", [n for n in TRAINED if n != "nll"])  # a ruined model learns which tokens are rare, too
def test_nothing_gets_worse_where_training_does_not_help(llama, name):
    """A rate that ruins every state leaves the start, to the bit, and the report says so."""
    files, checkpoint = llama
    options = {**KINDS[name], "rate": 3.0, "steps": 4, "every": 1}
    start = given_of(files, checkpoint, WINDOWS, recovery_of(options).options, True, "cpu").model.state_dict()
    given, report = run(files, checkpoint, options)
    after = given.model.state_dict()
    assert all(torch.equal(start[key], after[key]) for key in start)
    assert report.get("best_step", 0) == 0
    if "blocks" in report:
        assert report["left_as_they_were"] == list(given.blocks.values())


@pytest.mark.parametrize("name", TRAINED)
def test_a_gradient_that_is_not_finite_stops_with_the_layers_name(llama, name):
    files, checkpoint = llama

    def poison(given):  # the loss stays finite, its gradient does not: the square root's is infinite at 0
        module = given.model.get_submodule("model.layers.1.mlp.down_proj")
        module.register_forward_hook(lambda _m, _a, y: y + (y - y.detach()).abs().sqrt())

    with pytest.raises(FloatingPointError, match=r"the gradient of model\.layers\.[01]\.\S+ is not finite at step 1"):
        run(files, checkpoint, KINDS[name], change=poison)


@pytest.mark.parametrize("structure", ["low_rank", "basis_sharing"])
def test_a_fit_that_is_not_finite_stops_with_the_matrixs_name(structure, monkeypatch):
    """Attention hides a query that is not finite from all losses."""
    files, checkpoint = compressed("llama", structure)
    name = "model.layers.1.self_attn.q_proj"

    def ruin(given):
        given.dense.get_submodule(name).weight.data[0, 0] = math.nan

    with pytest.raises(FloatingPointError, match=rf"^{name}: its weight, or its inputs"):
        run(files, checkpoint, KINDS["sequential"], change=ruin)
    monkeypatch.setattr(sequential, "_fit_factors", lambda _task, _key, module, *_: module.left.weight.fill_(math.inf))
    with pytest.raises(FloatingPointError, match=r"left.weight is not finite after the fit"):
        run(files, checkpoint, KINDS["sequential"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_16_bit_checkpoints_stay_so_and_are_judged_as_stored(family, tmp_path):
    pico(family).bfloat16().save_pretrained(tmp_path / "model")
    files = files_of(tmp_path / "model", tmp_path)
    checkpoint = Bundle(build(tmp_path / "model", tmp_path / "work", ["ffn", "attention"], 0.4, metric="gram") / MANIFEST)
    for name in ("refine", "distill", "lora", "biases"):
        given, report = run(files, checkpoint, KINDS[name])
        for parameter in given.parameters().values():
            assert torch.equal(parameter, parameter.bfloat16().float())
        write_recovered(tmp_path / name, files, checkpoint, given, {"name": name, **KINDS[name]}, report, JOB)
        assert {t.dtype for t in load_file(tmp_path / name / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "name"), EVERYWHERE)
def test_the_dense_model_after_the_same_recovery(family, name, tmp_path):
    """It has nothing to learn from itself, to the bit; from the text it has."""
    files = compressed(family)[0]
    given, report = run(files, None, KINDS[name])
    assert set(given.modules) == {m.module for m in files.matrices}
    write_recovered(tmp_path / "out", files, None, given, {"name": "mine", **KINDS[name]}, report, JOB)
    manifest = Bundle(tmp_path / "out" / MANIFEST).manifest
    assert manifest["stored_bytes"] == manifest["dense_bytes"] == files.dense_bytes(files.matrices)
    assert manifest["model_stored_bytes"] == files.manifest["bytes"]
    loaded, dense = load_model(tmp_path / "out", "float32", "cpu").state_dict(), given.dense.state_dict()
    same = all(torch.equal(loaded[key], dense[key]) for key in dense)
    assert same == (name != "nll")
    if name != "nll":
        assert all(start == best == 0 for start, best in losses(report))


def test_blocks_are_replayed_as_the_model_calls_them(saved_model):
    model = load_model(saved_model, "float32", "cpu")
    outputs = []
    layers = [n for n, m in model.named_modules() if n.endswith((".0", ".1")) and type(m).__name__.endswith(("Layer", "Block"))]
    assert len(layers) == 2
    windows = WINDOWS[:20]
    way = Passage(model, layers, windows, 8)  # the last call is smaller
    for index, name in enumerate(layers):
        keep = lambda _m, _a, y: outputs.append(y[0] if isinstance(y, tuple) else y)  # noqa: E731
        hook = model.get_submodule(name).register_forward_hook(keep)
        with torch.no_grad():
            for start in range(0, 20, 8):
                model(input_ids=windows[start : start + 8].long(), use_cache=False)
        hook.remove()
        found = outputs_of(model.get_submodule(name), way.go_to(index), 8, torch.device("cpu"))
        assert torch.equal(found, torch.cat(outputs))
        assert torch.equal(found, way.go_to(index + 1).hidden)
        outputs.clear()


def test_a_block_that_gets_something_else_is_named():
    """And a model that does not call its blocks one after the other."""
    model = pico("llama")
    names = ["model.layers.0", "model.layers.1"]
    model.model.layers[0].register_forward_hook(lambda _m, _a, y: y + 1)
    Passage(model, names, WINDOWS[:4], 4)  # a block's hooks are part of it
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))
    with pytest.raises(RuntimeError, match=r"layers\.1 is not called with the output of model\.layers\.0"):
        Passage(model, names, WINDOWS[:4], 4)
    with pytest.raises(RuntimeError, match=r"layers\.0 is not called with the output of model\.layers\.1"):
        Passage(pico("llama"), names[::-1], WINDOWS[:4], 4)


def test_too_few_windows_are_refused(llama):
    files, checkpoint = llama
    with pytest.raises(InputError, match="8 calibration windows, 1 of them held out, are too few for a batch of 8"):
        run(files, checkpoint, KINDS["refine"], windows=WINDOWS[:8])


def test_models_without_what_is_needed_are_refused(tmp_path):
    for name, options, message in (
        ("bert_encoder", "distill", "BertModel has no logits to compare; use `refine`"),
        ("bert_encoder", "weighted", "BertModel has no logits, and so no loss"),
        ("bert_masked", "nll", "BertForMaskedLM does not predict the text's next tokens"),
    ):
        pico(name).save_pretrained(tmp_path / name)
        files = files_of(tmp_path / name, tmp_path / name)
        with pytest.raises(InputError, match=message):
            run(files, None, KINDS[options])
    pico("bert_masked").save_pretrained(tmp_path / "masked")
    checkpoint = Bundle(build(tmp_path / "masked", tmp_path / "work", ["ffn", "attention"], 0.4, metric="gram") / MANIFEST)
    _, report = run(files_of(tmp_path / "masked", tmp_path), checkpoint, KINDS["refine"])
    assert all(best < start for start, best in losses(report)), "an encoder is refined as any other"


def test_windows_and_rates_of_the_steps():
    rows = batches(10, 4, 7, seed=3)
    assert [len(row) for row in rows] == [4] * 7
    for first in (0, 2, 4):
        assert len(set(rows[first] + rows[first + 1])) == 8, "no window twice before all have been seen"
    assert batches(10, 4, 3, seed=3) == rows[:3] != batches(10, 4, 3, seed=4)
    options = recovery_of({"kind": "refine", "steps": 100, "warmup": 0.1}).options
    rates = [share_of_peak(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 1e-3
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert all(math.isfinite(rate) for rate in rates)


def test_a_block_that_is_nearly_right_is_moved_by_less_than_the_rate(llama, monkeypatch):
    """The first step of Adam moves numbers by the rate: the whole one where a block loses enough, less where it loses little."""
    files, checkpoint = llama
    start = given_of(files, checkpoint, WINDOWS, recovery_of({"kind": "refine"}).options, True, "cpu").model.state_dict()
    exact = {"steps": 1, "warmup": 0.0, "every": 1, "rate": 1e-3, "patience": None}
    key = "model.layers.0.self_attn.q_proj.left.weight"

    def moved(full: float) -> float:
        monkeypatch.setattr(refine, "FULL_RATE", full)
        monkeypatch.setattr(Progress, "best_step", property(lambda self: max(self.losses)))  # whatever it is, it is kept
        after = run(files, checkpoint, {"kind": "refine", **exact})[0].model.state_dict()
        return float((after[key] - start[key]).abs().max())

    loss = run(files, checkpoint, {"kind": "refine", **exact})[1]["blocks"]["model.layers.0"]["held_out_start"]
    assert moved(loss) == pytest.approx(1e-3, rel=1e-3)
    assert moved(100 * loss) == pytest.approx(1e-4, rel=1e-2)
    assert moved(loss / 100) == pytest.approx(1e-3, rel=1e-3)


# The plan: what stands beside what, and what a change runs anew.


def plan_of(change=lambda c: None) -> Plan:
    config = copy.deepcopy(default())
    config["evaluations"]["times"] = {"kind": "latency"}
    config["evaluations"]["tasks"] = {"kind": "accuracy", "tasks": ["hellaswag"]}
    config["experiments"]["demo"] |= {"recoveries": ["none", "refine"], "methods": ["svd"], "budgets": ["all-0.6"]}
    change(config)
    return Plan(load(config), ROOT)


def test_the_dense_model_with_the_recovery_is_a_cell_and_a_row():
    def change(c):
        c["experiments"]["demo"]["evaluations"] = ["demo", "tasks", "times"]
        c["calibrations"]["demo"]["seeds"] = [0, 1]

    plan = plan_of(change)
    healed = [cell for cell in plan.cells if cell.method is None and cell.recovery]
    assert healed == [
        Cell("demo", e, f"demo.seed-{s}", None, None, "refine", kind)
        for e, kind in (("demo", "perplexity"), ("tasks", "accuracy"))
        for s in (0, 1)
    ]
    labels = plan.labels
    folder = f"results/{labels['models']['demo']}/{labels['calibrations']['demo.seed-0']}/dense/{labels['recoveries']['refine']}"
    assert plan.paths.result(healed[0]) == f"{folder}/{labels['evaluations']['demo']}.json"
    rows = [row for row in plan.spec("tables", {})["rows"] if row["method"] == "dense"]
    assert [(row["recovery"], row["budget"], row["calibration"]) for row in rows] == [
        ("none", "dense", "none"),
        ("refine", "dense", "demo.seed-0"),
        ("refine", "dense", "demo.seed-1"),
    ]
    assert len({plan.paths.result(cell) for cell in plan.cells}) == len(plan.cells)
    plain = plan_of(lambda c: c["experiments"]["demo"].update(recoveries=["none"]))
    assert not [cell for cell in plain.cells if cell.method is None and cell.recovery]


def test_a_changed_option_moves_the_label_of_its_recovery_only():
    before, after = plan_of(), plan_of(lambda c: c["recoveries"]["refine"].update(steps=7))
    changed = {(s, n) for s in before.labels for n in before.labels[s] if before.labels[s][n] != after.labels[s][n]}
    assert changed == {("recoveries", "refine")}
    assert before.labels["recoveries"]["none"] == "none-13c862", "of results that people have"


def test_an_edit_of_a_kind_reaches_its_own_recoveries_only():
    plan = plan_of()
    labels = plan.labels
    wildcards = {"model": labels["models"]["demo"], "method": labels["methods"]["svd"], "budget": labels["budgets"]["ffn-0.8"]}
    codes = {n: plan.fingerprint("recover", {**wildcards, "recovery": labels["recoveries"][n]}) for n in ("refine", "distill")}
    modules = {name: {line.split()[0] for line in code} for name, code in codes.items()}
    assert {"winnow.recovery.refine", "winnow.recovery.training", "winnow.recovery.kinds.refine", "recover.py"} <= modules[
        "refine"
    ]
    assert "winnow.recovery.distill" in modules["distill"] - modules["refine"]
    assert "winnow.recovery.refine" not in modules["distill"]
    assert "winnow.recovery.kinds.refine" not in modules["distill"], "of the options, too, only those of the kind count"
    others = {stage: plan.fingerprint(stage, wildcards) for stage in ("compress", "evaluate_perplexity")}
    assert not any("recover" in line for code in others.values() for line in code)


def test_cards_and_exports_are_of_the_recovered_checkpoint():
    plan = plan_of(lambda c: c["experiments"]["demo"].update(export="dense"))
    cards = plan.spec("cards", {})["cards"]
    none, refine = (plan.labels["recoveries"][name] for name in ("none", "refine"))
    (plain,) = (path for path in cards if f"/{none}/" in path)
    (recovered,) = (path for path in cards if f"/{refine}/" in path)
    assert f"/{none}/" not in cards[plain]["checkpoint"]
    assert cards[recovered]["checkpoint"] == recovered.replace("README.md", "checkpoint/manifest.json")
    made = {plan.paths.made(cell, "dense_export") for cell in plan.cells.exported()}
    assert made == {of["checkpoint"].replace("/checkpoint/", "/dense_export/") for of in cards.values()}


def test_options_are_checked_in_one_line():
    def refused(**preset):
        with pytest.raises(InputError) as caught:
            plan_of(lambda c: c["recoveries"].update(mine=preset))
        return str(caught.value)

    assert "recoveries.mine: there is no kind 'refin'; did you mean 'refine'?" in refused(kind="refin")
    assert "recoveries.mine.step: unknown key; did you mean 'steps'?" in refused(kind="distill", step=3)
    assert "are only used with `parameters: lora`" in refused(kind="distill", lora_rank=4)
    with pytest.raises(InputError, match=r"recoveries\.none: the name is reserved for no recovery"):
        plan_of(lambda c: c["recoveries"].update(none={"kind": "refine"}))
    for kind, cls in RECOVERIES.items():
        options = cls.Options(kind=kind, **({"task": "some"} if kind == "finetune" else {}))
        assert recovery_of(options.model_dump()).options == options, "what the plan resolves is what the job reads"


def test_formats_do_not_change(llama, tmp_path):
    files, checkpoint = llama
    given, report = run(files, checkpoint, {**KINDS["refine"], "steps": 1})
    write_recovered(tmp_path / "out", files, checkpoint, given, {"name": "r", **KINDS["refine"]}, report, JOB)
    before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoint.directory, tmp_path / "out"))
    assert before == after
    WinnowConfig(**after["quantization_config"])


def product_of(module) -> torch.Tensor:
    """The matrix (out, in) that a module of factors multiplies by, by rows of the identity."""
    with torch.no_grad():
        return module.double()(torch.eye(module.right.in_features, dtype=torch.float64)).T


def with_ridge(x, target, weight):
    """(x, target) with a little of every input beside them, of which nothing is lost: what the fit adds to its moments."""
    little = (1e-4 * x.square().sum(0).median()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.cat([x, little]), torch.cat([target, little @ weight.T])


def least_error(x, target, rank, rows) -> float:
    """The least ||(target - x W^T) rows||^2 over W of a rank, by least squares on x itself and the singular values left over."""
    gram = x.T @ x
    b = torch.linalg.lstsq(x, target, rcond=len(gram) ** 0.5 * 2.0**-24, driver="gelsd").solution.T
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    left_over = torch.linalg.svdvals(rows.T @ b @ root)[rank:].square().sum()
    return float(((target - x @ b.T) @ rows).square().sum() + left_over)


@pytest.mark.parametrize("outputs", ["equal", "gradient"])
@pytest.mark.parametrize("structure", ["low_rank", "gauge_fixed"])
def test_what_is_fitted_anew_is_the_least_squares_optimum(saved_llama, structure, outputs, tmp_path):
    """Brute force: of all maps of the same rank none is nearer to W X, given the inputs X' of the compressed model."""
    files = files_of(saved_llama, tmp_path)
    checkpoint = Bundle(build(saved_llama, tmp_path / "work", ["ffn", "attention"], 0.4, structure, metric="gram") / MANIFEST)
    options = {**KINDS["sequential"], "held_out": 0.02, "outputs": outputs}
    start = given_of(files, checkpoint, WINDOWS, recovery_of(options).options, True, "cpu")
    given, _ = run(files, checkpoint, options)
    seen: dict[str, list] = {}
    for model in (given.model, given.dense):
        for part in ("q_proj", "o_proj"):
            name = f"model.layers.1.self_attn.{part}"
            keep = lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1).double())  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for model in (given.model, given.dense):
            model(input_ids=given.split()[0].long(), use_cache=False)
        for name, (own, dense) in seen.items():
            module, weight = given.model.get_submodule(name), given.dense.get_submodule(name).weight.double()
            assert not torch.equal(own, dense)
            own, target = with_ridge(own, dense @ weight.T, weight)
            metric = given.outputs(name) if outputs == "gradient" else torch.eye(len(weight), dtype=torch.float64)
            rows = torch.linalg.cholesky(metric)
            optimum = least_error(own, target, module.right.out_features, rows)
            product, before = (product_of(of.get_submodule(name)) for of in (given.model, start.model))
            assert float(((target - own @ product.T) @ rows).square().sum()) == pytest.approx(optimum, rel=1e-4)
            assert float(((target - own @ before.T) @ rows).square().sum()) > 1.001 * optimum


@pytest.mark.parametrize("options", [{}, {"objective": "shifted"}, {"outputs": "gradient"}])
@pytest.mark.parametrize(("family", "structure"), [("gpt2", "low_rank"), ("opt", "gauge_fixed"), ("opt", "basis_sharing")])
def test_biases_take_up_the_mean_of_the_errors(family, structure, options):
    """Brute force: of all pairs of a map of the same rank (with the right factor that layers share) and a bias none is nearer."""
    files, checkpoint = compressed(family, structure)
    given, _ = run(files, checkpoint, {**KINDS["biases"], "held_out": 0.02, **options})
    kept, _ = run(files, checkpoint, {**KINDS["biases"], "held_out": 0.02, **options, "biases": "kept"})
    (name,) = [m for m in given.modules if m.endswith(("layers.0.fc1", "h.0.mlp.c_fc"))]
    module, seen = given.model.get_submodule(name), []
    for model in (given.model, given.dense):
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for model in (given.model, given.dense):
            model(input_ids=given.split()[0].long(), use_cache=False)
        own, dense = seen if "objective" not in options else seen[:1] * 2
        assert not torch.equal(*seen)
        target, x = given.dense.get_submodule(name)(dense).double(), own.double()
        error = target - module(own).double()
        scale = target.std(0).max()
        assert error.mean(0).abs().max() < 1e-5 * scale
        assert (target - kept.model.get_submodule(name)(own)).mean(0).abs().max() > 1e-3 * scale, "the biases do something"
        unit = torch.eye(x.shape[1])
        weight, product = ((m(unit) - m(0 * unit)).T.double() for m in (given.dense.get_submodule(name), module))
        x, target = with_ridge(x - x.mean(0), target - target.mean(0), weight)
        error = target - x @ product.T
        if structure == "basis_sharing":
            x = x @ module.right.weight.double().T
        metric = given.outputs(name) if "outputs" in options else torch.eye(target.shape[1], dtype=torch.float64)
        rows = torch.linalg.cholesky(metric)
        optimum = least_error(x, target, module.right.out_features, rows)
        assert float((error @ rows).square().sum()) == pytest.approx(optimum, rel=1e-4)


def test_a_block_that_is_put_back_has_its_biases_back(monkeypatch):
    files, checkpoint = compressed("gpt2")
    start = given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["biases"]).options, True, "cpu").model.state_dict()
    wrong = lambda weight, *rest, **named: leading_directions(30 * weight, *rest, **named)  # noqa: E731
    monkeypatch.setattr("winnow.recovery.sequential.leading_directions", wrong)
    given, report = run(files, checkpoint, KINDS["biases"])
    after = given.model.state_dict()
    assert report["left_as_they_were"] == list(given.blocks.values())
    assert all(torch.equal(start[key], after[key]) for key in start)


def test_the_ridge_is_of_the_inputs_that_vary():
    """Neurons that never fire, and inputs that are constant but for rounding, say nothing of how large the others are."""
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 1:3], x[:, 3] = 0.0, 1e6 + 1e-11 * x[:, 3]
    seen = sequential.Inputs(x.T @ x, 2 * x.T @ x, x.mean(0), 2 * x.mean(0), 400)
    for centred in (False, True):
        gram, cross = seen.moments(centred)
        alive = [0, 3, 4] if not centred else [0, 4]
        y = x - x.mean(0) if centred else x
        expected = torch.zeros(5, 5, dtype=torch.float64)
        expected[torch.tensor(alive)[:, None], torch.tensor(alive)] = y[:, alive].T @ y[:, alive]
        ridge = 1e-4 * y[:, alive].square().sum(0).median() * torch.eye(5, dtype=torch.float64)
        assert torch.allclose(gram, expected + ridge, rtol=1e-9, atol=1e-9 * float(expected.max()))
        assert torch.allclose(cross, 2 * expected + ridge, rtol=1e-9, atol=1e-9 * float(expected.max()))
        assert float(gram[1, 1]) == pytest.approx(float(ridge[1, 1]))
    nothing = torch.zeros(5, 5, dtype=torch.float64)
    gram, cross = sequential.Inputs(nothing, nothing, nothing[0], nothing[0], 400).moments(centred=True)
    assert torch.equal(gram, cross)
    assert (gram.diagonal() > 0).all()


def test_a_model_whose_predictions_come_no_nearer_is_left_as_it_was(llama, monkeypatch):
    """By gradients, blocks are not judged by themselves; a wrong target ruins them, and all are put back, to the bit."""
    files, checkpoint = llama
    start = given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["weighted"]).options, True, "cpu").model.state_dict()
    with monkeypatch.context() as patch:
        wrong = lambda weight, *rest, **named: leading_directions(30 * weight, *rest, **named)  # noqa: E731
        patch.setattr("winnow.recovery.sequential.leading_directions", wrong)
        given, report = run(files, checkpoint, KINDS["weighted"])
    after = given.model.state_dict()
    assert all(torch.equal(start[key], after[key]) for key in start)
    assert report["divergence"]["held_out_best"] == report["divergence"]["held_out_start"]
    assert report["left_as_they_were"] == list(given.blocks.values())
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="not finite on the held-out windows"):
        patch.setattr("winnow.recovery.sequential.mean_of_windows", lambda *_: math.nan)
        run(files, checkpoint, KINDS["weighted"])
    given, report = run(files, checkpoint, KINDS["weighted"])
    assert report["divergence"]["held_out_best"] < report["divergence"]["held_out_start"]
    assert report["left_as_they_were"] == []
    assert any(not torch.equal(start[key], value) for key, value in given.model.state_dict().items())


def test_small_inputs_count_beside_massive_ones(tmp_path):
    """One channel 10,000 times the others, as massive activations are. The first block's inputs are the dense model's, so both
    objectives ask for the same matrix: the target of `anchored` must keep what the other channels say."""
    model = pico("llama")
    model.get_submodule("model.layers.0.input_layernorm").weight.data[0] *= 1e4
    model.save_pretrained(tmp_path / "model")
    files = files_of(tmp_path / "model", tmp_path)
    checkpoint = Bundle(build(tmp_path / "model", tmp_path / "work", ["attention"], 0.6, metric="weights") / MANIFEST)
    name = "model.layers.0.self_attn.q_proj"
    caught = []
    model.get_submodule(name).register_forward_pre_hook(lambda _m, args: caught.append(args[0].flatten(0, 1)[:, 1:].double()))
    with torch.no_grad():
        model(input_ids=WINDOWS.long())
    recovered = (run(files, checkpoint, {"kind": "sequential", "objective": o})[0].model for o in ("anchored", "shifted"))
    ours, theirs = (caught[0] @ product_of(m.get_submodule(name))[:, 1:].T for m in recovered)
    assert (ours - theirs).norm() < 0.05 * theirs.norm(), "all of it is lost where they are cut off"


def test_what_hardly_occurs_in_the_calibration_text_is_not_blown_up(llama, monkeypatch):
    """An input that the compressed model has at a ten-thousandth of its size: by those tokens alone it would be multiplied by
    thousands, and a text that has it at its size be ruined."""
    given = given_of(*llama, WINDOWS, recovery_of(KINDS["sequential"]).options, True, "cpu")
    key, rare = "model.layers.1.mlp.gate_proj", 3
    module, weight = given.model.get_submodule(key), given.dense.get_submodule(key).weight.double()
    dense, other = torch.randn(2, 200, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = dense.clone()
    own[:, rare] = 1e-4 * other[:, rare]
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    seen = sequential.Inputs(own.T @ own, dense.T @ own, mean, mean, 200)
    largest = {}
    for ridge in (sequential.RIDGE, 1e-16):
        monkeypatch.setattr(sequential, "RIDGE", ridge)
        with torch.no_grad():
            sequential._fit(given, key, module, seen)
        largest[ridge] = product_of(module)[:, rare].norm() / weight[:, rare].norm()
        module.float()
    first, without = largest.values()
    assert 0.5 < first < 2
    assert without > 100


def test_small_inputs_are_fitted_beside_massive_ones(llama):
    """As in the test before the last, where the compressed model's inputs are others: by brute force."""
    given = given_of(*llama, WINDOWS, recovery_of(KINDS["sequential"]).options, True, "cpu")
    key = "model.layers.1.mlp.gate_proj"
    module, weight = given.model.get_submodule(key), given.dense.get_submodule(key).weight.double()
    dense, other = torch.randn(2, 400, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense[:, 0] *= 1e4
    own = dense + 0.3 * other
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    with torch.no_grad():
        sequential._fit(given, key, module, sequential.Inputs(own.T @ own, dense.T @ own, mean, mean, 400))
    x, target = with_ridge(own, dense @ weight.T, weight)
    optimum = least_error(x, target, module.right.out_features, torch.eye(len(weight), dtype=torch.float64))
    assert float((target - x @ product_of(module).T).square().sum()) == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("kind", ["neuron_slice", "cluster", "coupled"])
def test_sequential_is_for_factors_of_their_own(saved_llama, kind, tmp_path):
    """A configuration is refused, a checkpoint stays as it is: an allocation of `mixed` may have chosen nothing else."""
    content = default()
    metric = {} if kind == "neuron_slice" else {"metric": {"kind": "weights"}}
    content["methods"]["mine"] = {"structure": {"kind": kind}, **metric}
    content["experiments"]["demo"] |= {"methods": ["mine"], "recoveries": ["none", "sequential"]}
    with pytest.raises(InputError, match=r"'sequential' refits low-rank factors .*'mine' stores neither; use `refine`"):
        load(content)
    content["experiments"]["demo"] |= {"methods": ["winnow"]}
    load(content)
    named = {"metric": "weights"} if metric else {}
    checkpoint = Bundle(build(saved_llama, tmp_path / "work", ["ffn"], 0.6, kind, **named) / MANIFEST)
    before = load_model(checkpoint.directory, "float32", "cpu").state_dict()
    given, report = run(files_of(saved_llama, tmp_path), checkpoint, KINDS["sequential"])
    assert all(torch.equal(value, before[key]) for key, value in given.model.state_dict().items())
    assert set(given.modules) <= set(report["left_as_they_were"])


def test_sequential_fits_one_side_of_a_coupling(saved_llama, tmp_path):
    options = {"sides": "one", "tying": "tied"}
    checkpoint = Bundle(build(saved_llama, tmp_path, ["ffn"], 0.6, "coupled", metric="gram", **options) / MANIFEST)
    before = load_model(checkpoint.directory, "float32", "cpu").state_dict()
    given, report = run(files_of(saved_llama, tmp_path), checkpoint, KINDS["sequential"])
    assert any(best < start for start, best in losses(report))
    changed = [key for key, value in given.model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.rpartition("proj.")[2] for key in changed} == {"left.weight"}


@pytest.mark.parametrize("kind", ["shared_basis", "cluster"])
def test_sequential_names_what_it_leaves(saved_llama, kind, tmp_path):
    parts = {"attention": {"kind": "low_rank"}, "ffn": {"kind": kind}}
    folder = build(saved_llama, tmp_path / "work", ["ffn", "attention"], 0.6, "by_target", metric="gram", parts=parts)
    given, report = run(files_of(saved_llama, tmp_path), Bundle(folder / MANIFEST), KINDS["sequential"])
    others = {name for name in given.modules if ".mlp." in name}
    assert others
    assert others <= set(report["left_as_they_were"])


# One recovery after another.

CHAIN = {
    "fitted": {"kind": "sequential"},
    "refined": {"kind": "refine", "after": "fitted", **SHORT},
    "learned": {"kind": "distill", "after": "refined", **SHORT},
}


def test_a_recovery_goes_on_from_the_one_before(llama, tmp_path):
    """By way of a checkpoint as in memory, but for what is in float32 between; the recipe says all, the dense model likewise."""
    files, checkpoint = llama
    given, report = run(files, checkpoint, CHAIN["fitted"])
    first = {"name": "fitted", **CHAIN["fitted"]}
    write_recovered(tmp_path / "fitted", files, checkpoint, given, first, report, JOB)
    middle = Bundle(tmp_path / "fitted" / MANIFEST)
    spec = {"after": CHAIN["fitted"], **{k: v for k, v in CHAIN["refined"].items() if k != "after"}}
    given, report = run(files, middle, spec)
    write_recovered(tmp_path / "refined", files, middle, given, {"name": "refined", **spec}, report, JOB)
    assert Bundle(tmp_path / "refined" / MANIFEST).manifest["stored_bytes"] == checkpoint.manifest["stored_bytes"]
    assert yaml.safe_load((tmp_path / "refined" / "recipe.yaml").read_text())["recovery"] == {"name": "refined", **spec}
    loaded = load_model(tmp_path / "refined", "float32", "cpu").state_dict()
    before = load_model(tmp_path / "fitted", "float32", "cpu").state_dict()
    assert any(not torch.equal(loaded[key], before[key]) for key in loaded)
    assert all(best <= start for start, best in losses(report))
    dense, _ = run(files, None, KINDS["nll"])
    write_recovered(tmp_path / "dense", files, None, dense, {"name": "d", **KINDS["nll"]}, {}, JOB)
    again, report = run(files, Bundle(tmp_path / "dense" / MANIFEST), KINDS["distill"])
    assert again.modules == [m.module for m in files.matrices]
    ((start, best),) = losses(report)
    assert 0 < best < start, "the dense model of the control had moved, and learns back"
    write_recovered(tmp_path / "twice", files, Bundle(tmp_path / "dense" / MANIFEST), again, {"name": "t"}, report, JOB)
    assert Bundle(tmp_path / "twice" / MANIFEST).manifest["model_stored_bytes"] == files.manifest["bytes"]


def chained(change=lambda c: None) -> Plan:
    def all_of(c):
        c["recoveries"] |= copy.deepcopy(CHAIN)
        c["experiments"]["demo"]["recoveries"] = ["none", "learned"]
        change(c)

    return plan_of(all_of)


def test_a_chain_in_the_plan():
    plan = chained()
    label = plan.labels["recoveries"]
    spec = plan.spec(
        "recover",
        {
            "model": plan.labels["models"]["demo"],
            "calibration": plan.labels["calibrations"]["demo"],
            "recovery": label["learned"],
        },
    )
    assert spec["recovery"]["after"]["after"]["kind"] == "sequential"
    assert "after" not in spec["recovery"]["after"]["after"]
    assert recovery_of(spec["recovery"]).options.steps == 12
    assert plan.config.steps("learned") == ["fitted", "refined", "learned"]
    moved = chained(lambda c: c["recoveries"]["fitted"].update(batch=4)).labels["recoveries"]
    assert {name for name in label if moved[name] != label[name]} == set(CHAIN), "what is downstream of a change, too"

    def rename(c):
        c["recoveries"].update(other=c["recoveries"].pop("fitted"), refined={**CHAIN["refined"], "after": "other"})

    renamed = chained(rename)
    assert renamed.labels["recoveries"]["learned"] == label["learned"], "a name is no content"


def test_a_chain_is_checked_in_one_line():
    def refused(**recoveries):
        with pytest.raises(InputError) as caught:
            chained(lambda c: c["recoveries"].update(recoveries))
        return str(caught.value)

    wrong = refused(refined={"kind": "refine", "after": "fited"})
    assert "recoveries.refined.after: there is no 'fited'; did you mean 'fitted'?" in wrong
    assert "would follow itself" in refused(fitted={"kind": "sequential", "after": "learned"})
    assert "there is no 'none'" in refused(refined={"kind": "refine", "after": "none"})
    assert "recoveries.none" in refused(none={"kind": "none", "after": "fitted"})
