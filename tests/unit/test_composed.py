"""Low rank and rounding composed: corners that are known structures, rounds that never lose, predictions, files, training."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import pico
from tests.unit.test_checkpoint import build, logits
from tests.unit.worlds import World, matrix_of
from winnow.checkpoint.export import export_dense
from winnow.checkpoint.loading import load_model
from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST
from winnow.metrics.base import METRICS
from winnow.models.architectures import GRADIENTS
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import in_float16
from winnow.planning.config import Method, load
from winnow.planning.config_files import default
from winnow.recovery.rounded import TrainedRounding
from winnow.structures.base import STRUCTURES
from winnow.structures.bypass import Bypass
from winnow.structures.parts import Seen, below, factor_parts, factors_of, round_factors

FED = {"group": 8, "grids": ["full"], "scales": "unbiased", "rounding": "feedback"}
ROUNDED = {"kind": "rounded", "bits": [2, 3], **FED}
BESIDE = {"kind": "bypass", "kept": 2, "remainder": ROUNDED}


def fits(spec, metric="two_sided", matrices=2, seed=5):
    """(structure, world, problem, fit) of some matrices by themselves."""
    world, structure = World(metric, 12, 20, seed), STRUCTURES.build(spec)
    for matrix in world.matrices[:matrices]:
        problem = world.problem(structure, [matrix])
        yield structure, world, problem, structure.fit(problem, structure.limit([matrix]))


def stored_matrix(structure, world, problem, fit, size):
    (matrix,) = problem.group
    model, _ = world.compressed(structure, [matrix], fit.tensors, size)
    return matrix_of(model.get_submodule(matrix.module), matrix.shape[1])


@pytest.mark.parametrize("metric", ["weights", "gram", "two_sided"])
@pytest.mark.parametrize("gauge", ["orthogonal", "split", "rotated"])
def test_full_rank_and_more_bits_come_close_to_the_matrix(metric, gauge):
    """With the rank of W, what is lost is what rounding loses, whichever pair of factors is rounded: its square falls by about 16
    with two more bits."""
    for *_, fit in fits({"kind": "rounded_low_rank", "ranks": [1.0], "bits": [4, 6], "gauge": gauge}, metric):
        assert float(fit.error[2]) < 3e-3 * float(fit.error[0])
        assert float(fit.error[2]) < 0.15 * float(fit.error[1])


def test_a_rotated_gauge_loses_least_with_error_feedback():
    """Columns of the left factor that are uncorrelated cannot compensate for each other."""
    lost = {}
    for gauge in ("orthogonal", "split", "rotated"):
        spec = {"kind": "rounded_low_rank", "ranks": [0.5], "bits": [3], "gauge": gauge}
        lost[gauge] = sum(float(fit.error[1] / fit.error[0]) for *_, fit in fits(spec, "gram", matrices=6))
    assert lost["rotated"] < min(lost["orthogonal"], lost["split"])


@pytest.mark.parametrize("metric", ["gram", "two_sided"])
def test_what_is_rounded_first_is_that_of_rounded(metric):
    """`remainder_first` with one round is LQER: the integers are those of `rounded`, and the term is the best of its rank for
    what they leave."""
    alone = fits(ROUNDED, metric)
    for (_, _, _, plain), (_, _, problem, fit) in zip(alone, fits(BESIDE | {"order": "remainder_first"}, metric), strict=True):
        for size in (1, 2):
            for name in ("steps", "scale"):
                assert torch.equal(fit.tensors[f"{size}.rest.1.{name}"], plain.tensors[f"{size}.{name}"])
            assert float(fit.error[size]) < float(plain.error[size])
            rest = problem.weights[problem.group[0].name] - STRUCTURES.build(ROUNDED).restored(plain.tensors, size, 12)
            columns, rows = problem.columns(), problem.rows()
            roots = [torch.linalg.cholesky(m) for m in (columns, rows if rows is not None else torch.eye(len(rest)).double())]
            values = torch.linalg.svdvals(roots[1].T @ rest @ roots[0])
            assert float(fit.error[size]) == pytest.approx(float(values[2:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("order", ["kept_first", "remainder_first"])
@pytest.mark.parametrize("kept_bits", [None, 8])
def test_rounds_never_raise_the_error(order, kept_bits):
    found = []
    for rounds in (1, 2, 4):
        spec = BESIDE | {"order": order, "rounds": rounds, "kept_bits": kept_bits}
        found.append(torch.stack([fit.error[1:] for *_, fit in fits(spec)]))
    assert (found[1] <= found[0] * (1 + 1e-12)).all()
    assert (found[2] <= found[1] * (1 + 1e-12)).all()
    assert (found[2] < found[0]).any(), "rounds change nothing"


def test_rounds_of_factors_never_raise_the_error():
    world = World("two_sided", 12, 20, 7)
    structure = STRUCTURES.build({"kind": "rounded_low_rank", "bits": [3]})
    matrix = world.matrices[0]
    problem = world.problem(structure, [matrix])
    weight, columns, rows = problem.weights[matrix.name], problem.columns(), problem.rows()
    left, right = torch.linalg.qr(weight)
    errors = []
    for rounds in (1, 3, 6):
        form = factors_of(12, 12, 12, 3, "full", None)
        product = round_factors(structure.rounded, matrix, weight, left, right, form, Seen(columns, rows), rounds)
        errors.append(product.error)
        assert product.error <= product.first == errors[0]
    assert errors[2] <= errors[1] < errors[0]


def test_a_matrix_of_the_rank_of_the_term_is_kept_exactly():
    world, structure = World("gram", 12, 20, 9), STRUCTURES.build(BESIDE | {"rounds": 2})
    matrix = world.matrices[0]
    world.weights[matrix.name] = world.weights[matrix.name][:, :2] @ world.weights[matrix.name][:2]
    problem = world.problem(structure, [matrix])
    fit = structure.fit(problem, 2)
    torch.testing.assert_close(stored_matrix(structure, world, problem, fit, 1), world.weights[matrix.name], atol=1e-3, rtol=0)
    assert float(fit.error[1]) < 1e-8 * float(fit.error[0])


@pytest.mark.parametrize(
    "spec",
    [
        BESIDE,
        BESIDE | {"rounds": 2, "kept_bits": 8},
        BESIDE | {"order": "remainder_first"},
        {"kind": "rounded_low_rank", "ranks": [0.5, 1.0], "bits": [3]},
        {"kind": "by_target", "parts": {"attention": {"kind": "rounded_low_rank"}, "ffn": BESIDE}},
    ],
    ids=str,
)
def test_predicted_losses_are_those_of_the_stored_matrix(spec):
    for structure, world, problem, fit in fits(spec, matrices=1):
        (matrix,) = problem.group
        x, g = world.inputs[matrix.layer, matrix.site], world.gradients[matrix.name]
        problem.sites[matrix.name]["gram"] = x @ x.T / x.shape[1]
        assert structure.predicts
        predicted = structure.predicted(problem, {k: t.float() if t.is_floating_point() else t for k, t in fit.tensors.items()})
        assert len(predicted) == len(fit.error) == structure.limit([matrix]) + 1
        for size in range(1, len(predicted)):
            change = world.weights[matrix.name] - stored_matrix(structure, world, problem, fit, size)
            by_hand = float((g.T @ change @ x).square().sum()) / 2 / x.shape[1] ** 2
            assert float(predicted[size]) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("correction", ["nystrom", "none"])
def test_predicted_losses_of_rounded_neurons_are_the_sum_over_the_matrices(correction):
    spec = {"kind": "rounded_neuron_slice", "criterion": "loss", "neurons": [0.5, 1.0], "bits": [3], "correction": correction}
    world, structure = World(None, 8, 14, 4), STRUCTURES.build(spec)
    group = world.groups(structure)[0]
    problem = world.problem(structure, group)
    fit = structure.fit(problem, 2)
    predicted = structure.predicted(problem, fit.tensors)
    order = fit.tensors["order"]
    for size in (1, 2):
        model, _ = world.compressed(structure, group, fit.tensors, size)
        total, kept = 0.0, order[: structure.sizes(group)[size - 1].neurons]
        for m in group:
            x, g, weight = world.inputs[m.layer, m.site], world.gradients[m.name], world.weights[m.name]
            if m.role == "down_proj":
                change = weight.clone()
                change[:, kept] -= matrix_of(model.get_submodule(m.module), len(kept))
            else:
                change, g = weight[kept] - matrix_of(model.get_submodule(m.module), m.shape[1]), g[kept]
            total += float((g.T @ change @ x).square().sum()) / 2 / x.shape[1] ** 2
        assert float(predicted[size]) == pytest.approx(total, rel=1e-6)
    assert structure.judged(group) == group
    assert set(structure.needs()) & set(GRADIENTS)


def test_all_neurons_rounded_to_nearest_are_the_rows_of_rounded():
    world = World(None, 8, 14, 6)
    forms = {"bits": [4], "group": None, "rounding": "nearest", "scales": "largest"}
    structure = STRUCTURES.build({"kind": "rounded_neuron_slice", "neurons": [1.0], "correction": "none", **forms})
    group = world.groups(structure)[0]
    fit = structure.fit(world.problem(structure, group), 1)
    model, _ = world.compressed(structure, group, fit.tensors, 1)
    alone, order = STRUCTURES.build({"kind": "rounded", "grids": ["full"], **forms}), fit.tensors["order"]
    world.metric = World("weights", 8, 14, 6).metric
    for m in group:
        whole = alone.restored(alone.fit(world.problem(alone, [m]), 1).tensors, 1, m.shape[1])
        found = matrix_of(model.get_submodule(m.module), m.shape[1])
        torch.testing.assert_close(found, whole[:, order] if m is group[-1] else whole[order])


FILES = {
    "beside": {"kind": "bypass", "kept": 1, "kept_bits": 8, "rounds": 2, "remainder": {"kind": "rounded", "bits": [3]}},
    "lqer": {"kind": "bypass", "kept": 1, "order": "remainder_first", "remainder": {"kind": "rounded", "bits": [3]}},
    "factors": {"kind": "rounded_low_rank", "ranks": [0.5], "grids": ["asymmetric"]},
    "neurons": {"kind": "rounded_neuron_slice", "neurons": [0.5], "grids": ["asymmetric"]},
}


@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in FILES), ("gpt2", "factors"), ("phi3", "neurons")])
def test_files_have_the_counted_bytes_and_load_again(family, name, tmp_path):
    pico(family).save_pretrained(tmp_path / "dense")
    kind = FILES[name]["kind"]
    targets = ["ffn"] if name == "neurons" else ["ffn", "attention"]
    options = {key: value for key, value in FILES[name].items() if key != "kind"}
    folder = build(tmp_path / "dense", tmp_path / "work", targets, None, kind, metric="gram", **options)
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    own = sum(t.nbytes for key, t in stored.items() if key.startswith(tuple(f"{name}." for name in config["layers"])))
    assert json.loads((folder / MANIFEST).read_text())["stored_bytes"] == own
    assert config["format_version"] == (2 if "grids" in options else 1)
    model = load_model(folder, "float32", "cpu")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", "float32", "cpu")), logits(model))
    if family != "phi3":  # whose fused matrix of fewer neurons has no dense form yet
        export_dense(folder, tmp_path / "export", {})
        exported = load_model(tmp_path / "export", "float32", "cpu")
        torch.testing.assert_close(logits(exported), logits(model), rtol=1e-4, atol=1e-5)
    parts = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    assert parts
    assert all(module.whole == (name != "neurons") for module in parts), "the dense matrix is no start for some of its rows"
    trained = TrainedRounding(parts[0], True, None)
    assert torch.equal(trained(), parts[0].matrix())


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"kind": "bypass", "rounds": 2}, "`rounds` are for a remainder of the kind rounded, not low_rank"),
        ({"kind": "bypass", "order": "remainder_first"}, "`order: remainder_first` and `rounds` are for a remainder of the kind"),
        ({"kind": "rounded_low_rank", "ranks": [0.5, 0.25]}, r"ranks must be in ascending order without duplicates"),
        ({"kind": "rounded_neuron_slice", "neurons": [0.5, 0.5]}, r"neurons must be in ascending order without duplicates"),
        (
            {"kind": "mixed", "members": [{"kind": "rounded"}, {"kind": "bypass", "remainder": {"kind": "shared_basis"}}]},
            "bypass has no predicted losses to choose by",
        ),
    ],
)
def test_what_does_not_compose_is_refused(structure, message):
    content = default()
    content["methods"]["mine"] = {"structure": structure, "metric": {"kind": "gram"}}
    with pytest.raises(InputError, match=message):
        load(content)


def test_lqer_is_its_formula_written_out():
    """W to nearest, and U_r S_r V_r diag(s)^-1 of the error times diag(s), with s the mean absolute inputs."""
    world, structure = World("mean_abs", 12, 20, 3), default()["methods"]["lqer"]["structure"]
    world.metric = METRICS.build(default()["methods"]["lqer"]["metric"])
    structure = STRUCTURES.build(structure | {"kept_fraction": 0.25, "kept_bits": None})
    matrix = world.matrices[0]
    problem = world.problem(structure, [matrix])
    weight, sizes = problem.weights[matrix.name], world.inputs[matrix.layer, matrix.site].abs().mean(1)
    scale = in_float16(weight.abs().amax(1, keepdim=True) / 7).double()  # 4 bits; all 12 inputs are one group
    rounded = (weight / scale).round().clamp(-7, 7) * scale
    u, s, v = torch.linalg.svd((weight - rounded) * sizes)
    expected = rounded + (u[:, :3] * s[:3]) @ v[:3] / sizes
    found = stored_matrix(structure, world, problem, structure.fit(problem, 1), 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # stored as float32
    assert (found - rounded).abs().max() > 1e-2


def test_factors_of_svd_llm_are_its_formula_written_out():
    """U S^1/2 and S^1/2 V^T L^-1 of W L, with L the Cholesky factor of the second moment, to within steps of 8 bits."""
    world, structure = World("gram", 12, 20, 11), default()["methods"]["svd_llm_gptq"]["structure"]
    structure = STRUCTURES.build(structure | {"ranks": [0.5], "bits": [8]})
    matrix = world.matrices[0]
    problem = world.problem(structure, [matrix])
    lower = torch.linalg.cholesky(problem.columns())
    u, s, v = torch.linalg.svd(problem.weights[matrix.name] @ lower)
    expected = {"left": u[:, :6] * s[:6].sqrt(), "right": s[:6, None].sqrt() * (v[:6] @ torch.linalg.inv(lower))}
    fit, (form,) = structure.fit(problem, 1), structure.sizes(12, 12)
    for name, (part, one) in factor_parts(structure.rounded, matrix, form).items():
        found = one.restored(below(fit.tensors, f"1.{name}."), 1, part.shape[1])
        found = found * s[0].sqrt() if name == "left" else found / s[0].sqrt()  # a constant, which rounding does not see
        signs = (found * expected[name]).sum(0 if name == "left" else 1).sign()
        found = found * (signs if name == "left" else signs[:, None])
        steps = (expected[name].amax(1) - expected[name].amin(1)) / 255
        assert ((found - expected[name]).abs() < 3 * steps[:, None]).all()


def test_presets_of_papers_are_the_corners():
    """Low rank of the error of rounding; both factors by GPTQ; SVD for attention, fewer neurons for the FFN, 8 bits for all."""
    methods = {name: Method.model_validate(default()["methods"][name]) for name in ("lqer", "svd_llm_gptq", "spq")}
    lqer = STRUCTURES.build(methods["lqer"].structure.model_dump())
    assert isinstance(lqer, Bypass)
    assert lqer.options.in_turn
    members = {m.structure.kind: STRUCTURES.build(m.structure.model_dump()) for m in methods["spq"].members()}
    assert members["by_target"].predicts
    world = World("weights", 8, 14, 4)
    roles = {kind: {m.role for group in own.groups(world.matrices) for m in group} for kind, own in members.items()}
    assert roles["by_target"] == {"q_proj", "k_proj", "o_proj"}
    assert roles["rounded_neuron_slice"] == {"gate_proj", "up_proj", "down_proj"}
    assert all(own.rounds() for own in members.values())
