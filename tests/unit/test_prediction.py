"""Predicted losses: exact against changes written out, and in the order of what is measured; matrices that stay dense."""

import copy
import json

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from tests.conftest import ROOT, pico
from tests.unit.test_checkpoint import logits, statistics
from tests.unit.worlds import World, matrix_of
from winnow.allocation.groups import allocate, chosen_groups, summarize
from winnow.allocation.rounds import Held, Setting, around, compressed_model, predict_in_rounds
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect
from winnow.checkpoint.in_memory import put
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.writer import compressed, recipe_of, write_checkpoint
from winnow.data.tokens import encode, load_tokenizer
from winnow.factors.fit import fit_groups, storable
from winnow.factors.predict import predict, unseen
from winnow.io.artifacts import Bundle, write_manifest, write_tensors
from winnow.metrics.base import METRICS
from winnow.models.architectures import group_name, matrices_of
from winnow.models.files import ModelFiles
from winnow.numerics.linalg import truncation_errors
from winnow.structures.base import STRUCTURES, Problem

PREDICTING = [kind for kind, cls in STRUCTURES.items() if cls.predicts]
OF_MATRICES = [kind for kind in PREDICTING if STRUCTURES[kind].objective == "metric"]
# Those whose predicted losses are exactly that of the change of the output; rounded gate and up are judged at their own outputs.
OF_FFNS = [{"kind": kind} for kind in PREDICTING if STRUCTURES[kind].objective == "ffn_output" and kind != "rounded_neuron_slice"]
OF_FFNS += [{"kind": "neuron_slice", "correction": "none", "criterion": criterion} for criterion in ("activation", "random")]


@pytest.mark.parametrize(("m", "n"), [(7, 12), (12, 7), (9, 9)])
def test_all_truncations_at_once_are_those_written_out(m, n, generator):
    """Any factors, also ones that are no projection of W; singular moments."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, left, right = normal(m, n), normal(m, 5), normal(5, n)
    x, g = normal(n, n - 2), normal(m, m - 3)
    found = truncation_errors(weight, left, right, x @ x.T, g @ g.T)
    for k in range(6):
        change = weight - left[:, :k] @ right[:k]
        assert float(found[k]) == pytest.approx(float((g.T @ change @ x).square().sum()), rel=1e-10)
    assert len(found) == 6


@pytest.mark.parametrize("kind", OF_MATRICES)
@pytest.mark.parametrize("metric", ["weights", "gram", "two_sided"])
def test_a_prediction_is_that_of_the_matrix_that_is_stored(kind, metric):
    world, structure = World(metric, 8, 14, seed=3), STRUCTURES.build({"kind": kind})
    for matrix in world.matrices[:6]:
        problem = world.problem(structure, [matrix])
        fit = structure.fit(problem, structure.largest([matrix]))
        x, g = world.inputs[matrix.layer, matrix.site], world.gradients[matrix.name]
        problem.sites[matrix.name]["gram"], problem.outputs[matrix.name]["gradient_gram"] = x @ x.T / 200, g @ g.T / 200
        predicted = structure.predicted(problem, fit.tensors)
        assert len(predicted) == len(fit.error)
        falls = metric == "two_sided" and (kind == "rounded" or not structure.rounds())
        assert (predicted.diff() <= 1e-9 * predicted[0]).all() or not falls, "its own metric falls with size"
        for size in range(1, len(predicted)):
            model, _ = world.compressed(structure, [matrix], fit.tensors, size)
            change = world.weights[matrix.name] - matrix_of(model.get_submodule(matrix.module), matrix.shape[1])
            by_hand = float((g.T @ change @ x).square().sum()) / 2 / 200**2
            assert float(predicted[size]) == pytest.approx(by_hand, rel=1e-6, abs=1e-9 * float(predicted[0]))


@pytest.mark.parametrize("spec", OF_FFNS, ids=str)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_prediction_of_an_ffn_is_that_of_the_change_of_its_output(spec, elsewhere):
    """At every size, also on other tokens than those of the fit (`elsewhere`), as in rounds."""
    world, structure = World(None, 6, 14, seed=4), STRUCTURES.build(spec)
    for group in structure.groups(world.matrices):
        layer, down = group[0].layer, group[-1]
        fit = structure.fit(world.problem(structure, group), structure.limit(group))
        if elsewhere:
            x = world.inputs[layer, "ffn_input"]
            world.inputs[layer, "ffn_input"] = x * x.roll(1, 1) + 0.5
            gate, up = (world.dense().get_submodule(m.module) for m in group[:2])
            with torch.no_grad():
                hidden = torch.nn.functional.silu(gate(world.inputs[layer, "ffn_input"].T))
                world.inputs[layer, "ffn_hidden"] = (hidden * up(world.inputs[layer, "ffn_input"].T)).T
        problem = world.problem(structure, group)
        problem.sites[down.name]["gram"] = world.moments(layer, "ffn_hidden")["gram"]
        predicted = structure.predicted(problem, fit.tensors)
        assert len(predicted) == len(fit.error)
        assert structure.judged(group) == [down]
        f = problem.outputs[down.name]["gradient_gram"]
        for size in range(1, len(predicted)):
            model, _ = world.compressed(structure, group, fit.tensors, size)
            change = world.ffn(model, layer) - world.ffn(world.dense(), layer)
            by_hand = float(((change @ f) * change).sum()) / 2 / len(change)
            assert float(predicted[size]) == pytest.approx(by_hand, rel=1e-6, abs=1e-9 * float(predicted[0]))


@pytest.fixture(scope="module")
def demo():
    """(model, matrices, moments, gradients, windows to measure on) of the demo model on a few windows of calibration text."""
    source = ROOT / "resources" / "models" / "demo"
    model = load_model(source, "float32", "cpu")
    texts = (ROOT / "resources" / "texts" / "demo" / "calibration.jsonl").read_text().splitlines()
    ids = encode(load_tokenizer(source), "\n\n".join(json.loads(row)["text"] for row in texts[:30]), True)
    windows = torch.as_tensor(ids[: 12 * 128]).reshape(12, 128)
    shapes = {name: {"shape": list(t.shape)} for name, t in model.state_dict().items()}
    matrices = matrices_of("llama", shapes)
    moments = dict(collect(model, matrices, windows, 4, torch.float64))
    gradients = dict(collect_gradients(model, matrices, windows, 4, torch.float64, "model", 0))
    return model, matrices, moments, gradients, windows[:6].long()


@torch.no_grad()
def log_probabilities(model, ids):
    return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def divergence(dense, now):
    """Nats per token."""
    return float((dense.exp() * (dense - now)).sum(-1).mean())


def in_order(predicted, measured):
    ratio = sorted(a / b for a, b in zip(measured, predicted, strict=True))[len(measured) // 2]
    return spearmanr(predicted, measured).statistic > 0.95 and 0.7 < ratio < 2.5


def test_predictions_are_in_the_order_of_what_is_measured(demo):
    """Every matrix of the demo model by itself, at a tenth and a third of the sizes."""
    model, matrices, moments, gradients, ids = demo
    dense = log_probabilities(model, ids)
    predicted, measured = [], []
    for m in matrices:
        weight = model.get_submodule(m.module).weight
        before = weight.detach().clone()
        w, c, f = before.double(), moments[m.layer][m.site]["gram"], gradients[m.layer][m.role]["gradient_gram"]
        u = torch.linalg.eigh(w @ c @ w.T).eigenvectors.flip(1)
        losses = truncation_errors(w, u, u.T @ w, c, f) / 2
        for size in (min(m.shape) // 10, min(m.shape) // 3):
            weight.data.copy_(u[:, :size] @ (u.T @ w)[:size])
            measured.append(divergence(dense, log_probabilities(model, ids)))
            predicted.append(float(losses[size]))
        weight.data.copy_(before)
    assert len(predicted) == 84
    assert in_order(predicted, measured)


@pytest.mark.parametrize("kind", ["neuron_slice", "affine_block"])
def test_predictions_of_ffns_are_in_the_order_of_what_is_measured(demo, kind):
    """Every FFN of the demo model by itself, at a third and at nearly all of the sizes."""
    model, matrices, moments, gradients, ids = demo
    dense, structure, predicted, measured = log_probabilities(model, ids), STRUCTURES.build({"kind": kind}), [], []
    for group in structure.groups(matrices):
        weights = {m.name: model.get_submodule(m.module).weight.detach().double() for m in group}
        sites = {m.name: moments[m.layer][m.site] for m in group}
        outputs = {m.name: gradients[m.layer][m.role] for m in group}
        problem = Problem(group, weights, sites, None, outputs=outputs)
        fit = structure.fit(problem, structure.largest(group))
        losses = structure.predicted(problem, fit.tensors)
        for size in (len(losses) // 3, len(losses) - 10):
            parts = structure.stored(group, fit.tensors, size)
            changed = copy.deepcopy(model)
            put(changed, {n: part.tensors for n, part in parts.items()}, {n: part.layout for n, part in parts.items()})
            measured.append(divergence(dense, log_probabilities(changed, ids)))
            predicted.append(float(losses[size]))
    assert len(predicted) == 12
    assert in_order(predicted, measured)


@pytest.fixture(scope="module")
def predicted_llama(saved_llama, tmp_path_factory):
    """(files, structure, groups with predictions, bundle of factors) of a random model."""
    work = tmp_path_factory.mktemp("predicted")
    moments, gradients = statistics(saved_llama, work / "statistics", windows=48)  # enough tokens for its 96 hidden units
    files, structure = ModelFiles(work / "statistics" / "model.json"), STRUCTURES.build({"kind": "low_rank"})
    rows = []
    for name, fit, numbers in fit_groups(
        files, moments, gradients, {}, structure, METRICS.build({"kind": "gram"}), "1-of-1", "cpu"
    ):
        tensors = storable(structure, fit) | {"error": fit.error, "numbers": torch.tensor(numbers)}
        write_tensors(work / "factors" / f"{name}.safetensors", tensors)
        rows.append({"group": name, "numbers": numbers, "error": fit.error.tolist()})
    write_manifest(work / "factors", {}, {})
    bundle = Bundle(work / "factors" / "manifest.json")
    factors = {row["group"]: bundle for row in rows}
    found = [{"group": n, "predicted": p.tolist()} for n, p in predict(files, moments, gradients, factors, structure, "cpu")]
    tables = (pd.DataFrame(table).set_index("group") for table in (rows, found))
    groups = chosen_groups(files, structure, ["ffn", "attention"], *tables)
    return files, structure, groups, factors, moments, gradients


def test_every_group_gets_a_prediction_of_every_size(predicted_llama):
    files, structure, groups, factors, moments, gradients = predicted_llama
    assert {g.name for g in groups} == {group_name(g) for g in structure.groups(files.matrices)}
    for g in groups:
        assert len(g.predicted) == len(g.numbers) == len(g.error)
        (matrix,) = g.matrices
        fit = factors[g.name].tensors(f"{g.name}.safetensors")
        site = moments.tensors(f"layer-{matrix.layer:03d}.safetensors")
        c = unseen({need: site[f"{matrix.site}.{need}"].double() for need in ("gram", "count", "max_abs")})["gram"]
        f = gradients.tensors(f"layer-{matrix.layer:03d}.safetensors")[f"{matrix.role}.gradient_gram"].double()
        k = g.largest // 2
        change = files.weight(matrix) - fit["left"][:, :k].double() @ fit["right"][:k].double()
        assert g.predicted[k] == pytest.approx(float(torch.trace(f @ change @ c @ change.T)) / 2, rel=1e-6)


def test_one_token_more_is_as_if_it_had_been_seen(generator):
    x = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    x[:, 2] = 0
    site = {"gram": x.T @ x / 50, "count": torch.tensor(50.0), "max_abs": x.abs().amax(0), "mean": x.mean(0)}
    found = unseen(site)
    energy = site["max_abs"][[0, 1, 3, 4, 5, 6]].square().sort().values[2]  # of an even number, the lower one in the middle
    assert torch.allclose(found["gram"], (x.T @ x + energy * torch.eye(7)) / 51, rtol=1e-12)
    assert torch.equal(found["mean"], site["mean"])
    assert torch.equal(site["gram"], x.T @ x / 50)
    nothing = unseen({"gram": torch.zeros(3, 3), "count": torch.tensor(0.0), "max_abs": torch.zeros(3)})
    assert torch.equal(nothing["gram"], torch.zeros(3, 3))


@pytest.mark.parametrize("correction", ["none", "nystrom"])
def test_hidden_units_that_never_fired_do_not_go_for_free(tmp_path, correction):
    """Of an OPT whose first ten units do not fire on the calibration text: leaving them out costs what one token more says."""
    model = pico("opt")
    for module in model.modules():
        if hasattr(module, "fc1"):
            module.fc1.bias.data[:10] = -1000.0
    model.save_pretrained(tmp_path / "model")
    moments, gradients = statistics(tmp_path / "model", tmp_path / "statistics", windows=32)
    files = ModelFiles(tmp_path / "statistics" / "model.json")
    structure = STRUCTURES.build({"kind": "neuron_slice", "criterion": "loss", "correction": correction})
    for name, fit, numbers in fit_groups(files, moments, gradients, {}, structure, None, "1-of-1", "cpu"):
        tensors = storable(structure, fit) | {"numbers": torch.tensor(numbers)}
        write_tensors(tmp_path / "factors" / f"{name}.safetensors", tensors)
    write_manifest(tmp_path / "factors", {}, {})
    bundle = Bundle(tmp_path / "factors" / "manifest.json")
    factors = {group_name(group): bundle for group in structure.groups(files.matrices)}
    predicted = dict(predict(files, moments, gradients, factors, structure, "cpu"))
    for group in structure.groups(files.matrices):
        down, found = group[-1], predicted[group_name(group)][group[-1].shape[1] - 10]
        held = moments.tensors(f"layer-{down.layer:03d}.safetensors")
        site = {need: held[f"{down.site}.{need}"] for need in ("count", "max_abs")}
        weight = files.weight(down)[:, :10]
        f = gradients.tensors(f"layer-{down.layer:03d}.safetensors")[f"{down.role}.gradient_gram"].double()
        assert (site["max_abs"][:10] == 0).all()
        energy = site["max_abs"][site["max_abs"] > 0].double().square().median() / (int(site["count"]) + 1)
        assert float(found) == pytest.approx(float(energy * torch.trace(weight.T @ f @ weight)) / 2, rel=1e-5)
        assert found > 0


def test_a_checkpoint_keeps_matrices_dense_and_counts_their_bytes(predicted_llama, saved_llama, tmp_path):
    files, structure, groups, factors, *_ = predicted_llama
    sizes = {g.name: None if i % 2 else 3 for i, g in enumerate(groups)}
    method = {"structure": {"kind": "low_rank"}, "metric": {"kind": "gram"}}
    presets = {"model": {"source": "somewhere"}, "method": method, "budget": {"targets": ["ffn", "attention"]}}
    recipe = recipe_of({"model": "pico"}, presets, summarize(groups, sizes))
    counts = write_checkpoint(tmp_path / "checkpoint", files, compressed(files, factors, structure, sizes), "float32", recipe, {})
    assert counts["stored_bytes"] == sum(g.bytes(sizes[g.name]) for g in groups)
    assert counts["dense_bytes"] - counts["stored_bytes"] == files.manifest["bytes"] - counts["model_stored_bytes"]
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert f"The allocation keeps {len(groups) // 2} matrices or groups dense" in card
    model, expected = load_model(tmp_path / "checkpoint", "float32", "cpu"), load_model(saved_llama, "float32", "cpu")
    for g in groups:
        module = model.get_submodule(g.matrices[0].module)
        assert type(module).__name__ == ("Linear" if sizes[g.name] is None else "LowRankLinear")
        if sizes[g.name] is not None:
            weight = expected.get_submodule(g.matrices[0].module).weight
            weight.data.copy_(module.left.weight @ module.right.weight)
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
def test_an_allocation_by_prediction_meets_the_bytes_of_a_model(predicted_llama):
    groups = predicted_llama[2]
    budget = {"keep_bytes": 0.7, "allocation": {"kind": "ilp"}}
    choice = allocate(groups, budget)
    assert choice.facts["status"] == "optimal"
    assert summarize(groups, choice.sizes)["predicted"] == pytest.approx(choice.facts["value"])


def setting_of(precision=torch.float64):
    windows = torch.randint(0, 1024, (6, 24), generator=torch.Generator().manual_seed(5))
    return Setting(windows, 3, "float32", "cpu", precision, True, "model", 0)


def test_around_the_dense_model_is_the_first_prediction(predicted_llama, saved_llama):
    """The same statistics, from a model whose matrices all stay dense; and the compressed model is that of the checkpoint."""
    files, structure, groups, factors, *_ = predicted_llama
    setting, dense = setting_of(), dict.fromkeys((g.name for g in groups), None)
    found = around(compressed_model(files, factors, structure, dense, setting), files, factors, structure, setting)
    model = load_model(saved_llama, "float32", "cpu")
    moments = Held(collect(model, files.matrices, setting.windows, 3, torch.float64))
    gradients = Held(collect_gradients(model, files.matrices, setting.windows, 3, torch.float64, "model", 0))
    expected = dict(predict(files, moments, gradients, factors, structure, "cpu"))
    assert found.keys() == expected.keys() == dense.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-9)
    small = compressed_model(files, factors, structure, {**dense, groups[0].name: 2}, setting)
    module = small.get_submodule(groups[0].matrices[0].module)
    fit = factors[groups[0].name].tensors(f"{groups[0].name}.safetensors")
    assert torch.equal(module.left.weight, fit["left"][:, :2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
def test_the_round_that_loses_least_is_kept(predicted_llama):
    files, structure, groups, factors, *_ = predicted_llama
    budget = {"keep_bytes": 0.5, "allocation": {"kind": "ilp", "rounds": 2}}
    found, records = predict_in_rounds(files, factors, structure, groups, budget, 2, setting_of())
    assert [record["round"] for record in records] == [0, 1, 2]
    best = min(records, key=lambda record: record["calibration_nll"])
    assert [record["chosen"] for record in records] == [record is best for record in records]
    if best["round"] == 0:
        assert found == {g.name: g.predicted for g in groups}
    else:
        assert all(found[g.name] != g.predicted for g in groups)
    again = predict_in_rounds(files, factors, structure, groups, budget, 2, setting_of())
    assert again == (found, records)
