"""Rounding of rotated matrices: the transform, what is stored and computed, and what other programs refuse."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import winnow
from tests.conftest import pico
from tests.unit import exports
from tests.unit.test_checkpoint import build, logits
from tests.unit.test_recovery import KINDS, files_of, losses, run
from tests.unit.worlds import World
from winnow.allocation.time_forms import filled
from winnow.checkpoint import hf
from winnow.checkpoint.export import Checkpoint, export_dense
from winnow.checkpoint.layouts import install
from winnow.checkpoint.loading import load_model
from winnow.engines.gguf.matrices import Matrices
from winnow.engines.vllm.checked import described
from winnow.errors import InputError
from winnow.evaluation.latency import held
from winnow.io.artifacts import MANIFEST, Bundle
from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix
from winnow.numerics import hadamard
from winnow.numerics.grids import forms_of
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rotated import RotatedLinear, Rotation, rotation_of
from winnow.recovery.rounded import INSIDE, rounded_modules, trainable
from winnow.structures.base import FORMATS, RUNTIMES, STRUCTURES, Problem

ALL = ["ffn", "attention"]
CPU, DOUBLE = torch.device("cpu"), torch.float64
TURNED = {"bits": [3], "group": 16, "grids": ["full"], "scales": "unbiased", "rounding": "feedback"}


def explicit(n: int) -> torch.Tensor:
    """T (n, n), written out: the cosine transform of the odd part, and the Hadamard matrix by the parity of common bits."""
    k, width = n, 1
    while k % 2 == 0:
        k, width = k // 2, 2 * width
    cosine = [[math.sqrt((1 if i else 0.5) * 2 / k) * math.cos(math.pi * i * (j + 0.5) / k) for j in range(k)] for i in range(k)]
    signs = [[(-1.0) ** (i & j).bit_count() / math.sqrt(width) for j in range(width)] for i in range(width)]
    return torch.kron(torch.tensor(cosine, dtype=DOUBLE), torch.tensor(signs, dtype=DOUBLE))


@pytest.mark.parametrize("n", [1, 2, 7, 12, 64, 96, 256, 352])
def test_the_transform_is_orthogonal_and_the_one_written_out(n):
    signs, unit = hadamard.signs_of("inputs", n), torch.eye(n, dtype=DOUBLE)
    found = hadamard.rotated(unit, signs).T
    torch.testing.assert_close(found, explicit(n) * signs, rtol=0, atol=1e-13)
    torch.testing.assert_close(found @ found.T, unit, rtol=0, atol=1e-13)
    x = torch.randn(2, 3, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(hadamard.rotated_back(hadamard.rotated(x, signs), signs), x, rtol=0, atol=1e-13)
    assert torch.equal(hadamard.unpacked_signs(hadamard.packed_signs(signs), n, DOUBLE), signs)
    assert n < 64 or 0.3 * n < int((signs < 0).sum()) < 0.7 * n


def problem_of(m: int, n: int, metric: str = "two_sided") -> tuple[Matrix, Problem]:
    draw = torch.Generator().manual_seed(m)
    w, x, g = (torch.randn(*shape, dtype=DOUBLE, generator=draw) for shape in ((m, n), (n, 3 * n), (m, 3 * m)))
    x *= torch.rand(n, 1, dtype=DOUBLE, generator=draw) ** 2
    matrix = Matrix(0, "up_proj", "l.up_proj", "ffn_input", (m, n), False, True)
    sites, outputs = ({matrix.name: {key: t @ t.T / t.shape[1]}} for key, t in (("gram", x), ("gradient_gram", g)))
    return matrix, Problem([matrix], {matrix.name: w}, sites, METRICS.build({"kind": metric}), outputs=outputs)


def module_of(matrix: Matrix, structure, fit, size: int) -> nn.Module:
    """The module of a size with the tensors that a checkpoint would have, and a random bias."""
    part = structure.stored([matrix], fit.tensors, size)[matrix.module]
    bias = torch.randn(matrix.shape[0], dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    module = structure.module(part.layout, nn.Linear(1, 1))
    module.load_state_dict({**part.tensors, "bias": bias}, assign=True)
    return module.requires_grad_(False)


@pytest.mark.parametrize("metric", ["weights", "second_moment", "gram", "two_sided"])
@pytest.mark.parametrize("grid", ["full", "asymmetric"])
def test_a_product_and_its_predicted_loss_are_those_of_the_matrix_rotated_back(grid, metric):
    matrix, problem = problem_of(24, 40, metric)
    problem.sites[matrix.name]["rms"] = problem.sites[matrix.name]["gram"].diagonal().sqrt()
    options = TURNED | {"bits": [2, 8], "grids": [grid], "rotations": ["none", "inputs", "both"]}
    structure = STRUCTURES.build({"kind": "rounded", **options})
    fit = structure.fit(problem, 6)
    predicted, (weight,) = structure.predicted(problem, fit.tensors), problem.weights.values()
    (c, r), measured = structure.metric_of_error(problem), []
    c, r = (t if t is None or t.dim() == 2 else t.diag() for t in (c, r))
    for size, form in enumerate(structure.forms(24, 40), start=1):
        module = module_of(matrix, structure, fit, size)
        x = torch.randn(5, 40, dtype=DOUBLE, generator=torch.Generator().manual_seed(size))
        plain = module if form.rotation == "none" else module.rounded
        signs = [hadamard.signs_of(side, n) for side, n in (("inputs", 40), ("outputs", 24))]
        v = explicit(40) * signs[0] if form.rotation != "none" else torch.eye(40, dtype=DOUBLE)
        u = explicit(24) * signs[1] if form.rotation == "both" else torch.eye(24, dtype=DOUBLE)
        used = u.T @ plain.matrix().double() @ v
        torch.testing.assert_close(module(x), x @ used.T + module.bias, rtol=0, atol=1e-12)
        f, gram = problem.outputs[matrix.name]["gradient_gram"], problem.sites[matrix.name]["gram"]
        change = used - weight
        assert float(predicted[size]) == pytest.approx(float((f @ change @ gram @ change.T).trace()) / 2, rel=1e-6)
        weighted = change if r is None else r @ change
        assert float(fit.error[size]) == pytest.approx(float((weighted @ c @ change.T).trace()), rel=1e-6)
        measured.append((form.bits, float(change.norm() / weight.norm())))
    assert all(lost < 0.05 for bits, lost in measured if bits == 8), "nearly the matrix itself"
    assert all(0.1 < lost < 1 for bits, lost in measured if bits == 2)


@pytest.mark.parametrize("shape", [(24, 40), (1, 1), (29, 352)])
@pytest.mark.parametrize("which", ["none", "inputs", "both"])
def test_without_rounding_a_rotation_changes_nothing(which, shape):
    matrix, problem = problem_of(*shape)
    rotation, w = rotation_of(which, *shape, CPU), problem.weights[matrix.name]
    c, f = problem.sites[matrix.name]["gram"], problem.outputs[matrix.name]["gradient_gram"]
    torch.testing.assert_close(rotation.back(rotation.matrix(w)), w, rtol=0, atol=1e-12)
    turned = rotation.matrix(w)
    traces = [(r @ d @ g @ d.T).trace() for r, d, g in ((f, w, c), (rotation.rows(f), turned, rotation.columns(c)))]
    torch.testing.assert_close(*traces, rtol=1e-11, atol=0)
    assert (which == "none") == torch.equal(turned, w) or shape == (1, 1)
    for diagonal in (torch.ones(shape[1], dtype=DOUBLE), torch.rand(shape[1], dtype=DOUBLE)):
        found = rotation.columns(diagonal)
        whole = found if found.dim() == 2 else found.diag()
        torch.testing.assert_close(whole, rotation.columns(diagonal.diag()), rtol=0, atol=1e-12)
    assert rotation.columns(torch.ones(shape[1])).dim() == 1, "rounding to nearest stays the best"
    assert rotation.rows(None) is None


def test_sizes_are_all_rotations_by_their_bytes_and_a_side_of_large_odd_width_stays_as_it_is(caplog):
    forms = forms_of(64, 96, [2, 3], ["full"], [None], ["both", "none", "inputs"])
    assert [(f.bits, f.rotation) for f in forms] == [(b, r) for b in (2, 3) for r in ("none", "inputs", "both")]
    assert [f.bytes(64, 96) - 64 * f.row_bytes(96) for f in forms[:3]] == [0, 12, 12 + 8]
    odd = 2 * 257
    turns = ["none", "inputs", "both"]
    assert [f.rotation for f in forms_of(odd, 96, [2], ["full"], [None], turns)] == ["none", "inputs"]
    assert [f.rotation for f in forms_of(96, odd, [2], ["full"], [None], turns)] == ["none"]
    assert hadamard.factors_of(11008) == [43, 16, 16]
    with pytest.raises(ValueError, match="514 channels are not rotated: their odd part, 257, is larger than 256"):
        hadamard.factors_of(odd)
    matrix, problem = problem_of(odd, 8, "weights")
    with caplog.at_level(logging.INFO, "winnow"):
        STRUCTURES.build({"kind": "rounded", "rotations": ["both"]}).fit(problem, 1)
    assert "the outputs are not rotated: the odd part of 514, 257, is larger than 256" in caplog.text
    assert matrix.name in caplog.text


@pytest.fixture(scope="module")
def turned(saved, tmp_path_factory):
    """{(family, rotation): checkpoint}"""
    made = {}
    for family, which in (("llama", "inputs"), ("gpt2", "both")):
        options = TURNED | {"rotations": [which]}
        made[family, which] = build(saved(family), tmp_path_factory.mktemp(which), ALL, 0.6, "rounded", "two_sided", **options)
    return made


@pytest.mark.parametrize("which", [("llama", "inputs"), ("gpt2", "both")], ids="-".join)
def test_files_have_the_bytes_that_were_counted_and_load_and_export(which, turned, tmp_path):
    folder = turned[which]
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    config, structure = config["quantization_config"], STRUCTURES.build({"kind": "rounded", **TURNED, "rotations": [which[1]]})
    total = 0
    for name, layout in config["layers"].items():
        matrix = Matrix(0, "up_proj", name, "ffn_input", (layout["out"], layout["in"]), False, False)
        own = [t for key, t in stored.items() if key.startswith(f"{name}.") and not key.endswith(".bias")]
        assert sum(t.nbytes for t in own) == structure.index_bytes([matrix], 1)
        assert layout["rotation"] == which[1]
        assert structure.layouts([matrix], 1)[name] == layout
        total += structure.index_bytes([matrix], 1) + stored.get(f"{name}.bias", torch.empty(0)).nbytes
    assert json.loads((folder / MANIFEST).read_text())["stored_bytes"] == total
    assert config["format_version"] == 3
    assert "checkpoint format 3" in (folder / "README.md").read_text()
    loaded = load_model(folder, "float32", "cpu")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", "float32", "cpu")), logits(loaded))
    export_dense(folder, tmp_path / "export", {})
    torch.testing.assert_close(logits(load_model(tmp_path / "export", "float32", "cpu")), logits(loaded), rtol=1e-4, atol=1e-5)


def test_older_versions_and_other_programs_refuse_it_in_one_line(turned, tmp_path, monkeypatch):
    folder, name = turned["llama", "inputs"], "model.layers.0.self_attn.q_proj"
    line = exports.refused(tmp_path, folder, monkeypatch, form="compressed-tensors")
    why = "its inputs are rotated, for which the format has no place; use --format dense"
    assert f"{name} (rounded) cannot be exported to compressed-tensors: {why}" in line
    with pytest.raises(InputError, match=rf"{name} \(rounded\) cannot be exported to gguf: its inputs are rotated, which llama"):
        next(iter(Matrices(Checkpoint(folder), in_blocks=False)))
    model = pico("llama")
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    given = {"format_version": 3, "layers": layers}
    with pytest.raises(InputError, match=r"vLLM does not rotate the inputs of rounded matrices; load the checkpoint with"):
        described(model.config, given)
    monkeypatch.setattr(hf, "FORMATS", FORMATS[:-1])
    with pytest.raises(InputError, match="winnow format 3, but this installation reads formats 1, 2; install the version"):
        hf.WinnowConfig(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rotation": "outputs"}, "the rotation 'outputs', but only"), ({"in": 514}, "514 inputs cannot be rotated")],
)
def test_a_damaged_layout_is_refused_by_name(change, message):
    layout = {"kind": "rounded", "out": 64, "in": 64, "bits": 3, "group": 16, "rotation": "both"} | change
    model = pico("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(514, 64) if "in" in change else nn.Linear(64, 64)
    with pytest.raises(InputError, match=rf"the layout of model\.layers\.0\.mlp\.up_proj \(rounded\) .*{message}"):
        install(model, {"model.layers.0.mlp.up_proj": layout})


def test_runtimes_that_do_not_rotate_run_no_rotated_form():
    structure = STRUCTURES.build({"kind": "rounded", "group": 32, "rotations": ["none", "inputs", "both"]})
    matrix = Matrix(0, "up_proj", "l.up_proj", "ffn_input", (64, 96), False, False)
    run = {runtime: [structure.runs([matrix], size, runtime) for size in (1, 2, 3)] for runtime in RUNTIMES}
    assert run["any"] == run["torch"] == [True, True, True]
    assert run["vllm"] == run["gguf"] == run["compressed-tensors"] == [True, False, False]


def test_a_few_tokens_in_bfloat16_use_the_kernel_inside():
    matrix, problem = problem_of(64, 96)
    structure = STRUCTURES.build({"kind": "rounded", **TURNED, "group": 32, "bits": [4], "rotations": ["both"]})
    module = module_of(matrix, structure, structure.fit(problem, 1), 1)
    x = torch.randn(3, 96, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    exact = module(x)
    module = module.bfloat16()
    found = module(x.bfloat16())
    assert module.rounded.planes is not None
    assert float((found.double() - exact).norm() / exact.norm()) < 0.01
    parts = {id(t) for t in held(module)}
    assert {id(t) for t in module.rounded.planes.tensors()} <= parts
    assert {id(module.signs(name, torch.float32)) for name in ("inputs", "outputs")} <= parts
    state = module.state_dict()
    winnow.for_inference(module)
    assert module.rounded.released
    assert torch.equal(module(x.bfloat16()), found)
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_changed_signs_are_seen_and_gradients_pass_and_it_compiles():
    module = filled(RotatedLinear(RoundedLinear(24, 16, 3, 8, False), True, True), torch.float32, "cpu").requires_grad_(False)
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = module(x.clone())
    x.requires_grad_(True)
    module(x).sum().backward()
    torch.testing.assert_close(module(x).detach(), before.clone())
    whole = module(torch.eye(24)) - module.bias
    torch.testing.assert_close(x.grad, whole.sum(1).expand(2, -1), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    module.inputs.bitwise_xor_(255)
    torch.testing.assert_close(module(x) - module.bias, module.bias - before, rtol=1e-4, atol=1e-5)


def test_training_starts_from_the_rotated_matrix_and_lowers_the_loss(saved_llama, tmp_path):
    files = files_of(saved_llama, tmp_path)
    options = TURNED | {"rotations": ["both"]}
    checkpoint = Bundle(build(saved_llama, tmp_path / "work", ALL, 0.6, "rounded", "two_sided", **options) / MANIFEST)
    given, report = run(files, checkpoint, KINDS["refine"] | {"rounded": "codes", "code_rate": 0.02, "rate": 3e-3})
    assert losses(report)
    for start, best in losses(report):
        assert best < start
    key = "model.layers.0.mlp.up_proj"
    module = rounded_modules(given)[f"{key}.rounded"]
    around, dense = given.model.get_submodule(key), given.dense.get_submodule(key).weight
    expected = Rotation(*(around.signs(side, torch.float32) for side in ("inputs", "outputs"))).matrix(dense)
    steps, scale, _ = module.parts()
    with trainable(given):
        places = module.trained.place.detach()
        wide = scale.repeat_interleave(16, 1)[:, : module.in_features]
        inside = (expected / wide - steps).abs() < INSIDE
        assert 0.3 < inside.float().mean() < 1
        torch.testing.assert_close(places[inside], (expected / wide)[inside], rtol=1e-4, atol=1e-4)


def test_the_forecast_has_the_transforms_and_the_metrics_of_every_rotation():
    matrix, problem = problem_of(24, 40)
    found = {}
    for turns in (["none"], ["none", "inputs"], ["none", "inputs", "both"]):
        structure = STRUCTURES.build({"kind": "rounded", **TURNED, "rotations": turns})
        needs = ("gram", "gradient_gram")
        found[len(turns)] = structure.work([matrix], needs)
        _, operations, disk = found[len(turns)]
        fit = structure.fit(problem, len(turns))
        assert disk >= sum(t.nbytes for t in fit.tensors.values()) > 0.9 * disk
        others = [structure.work([matrix], needs[:1])[1], *(before[1] for count, before in found.items() if count < len(turns))]
        assert operations > max(others)
    assert found[1][0] < found[2][0] < found[3][0]


def test_outliers_are_what_a_rotation_spreads():
    """One input weight in twenty is large: the groups' scales fit the others only after a rotation."""
    matrix, problem = problem_of(32, 64, "weights")
    problem.weights[matrix.name][torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) < 0.05] *= 8
    structure = STRUCTURES.build({"kind": "rounded", "bits": [3], "group": 64, "rotations": ["none", "inputs", "both"]})
    plain, *others = structure.fit(problem, 3).error[1:].tolist()
    assert max(others) < 0.6 * plain


def test_predicted_losses_of_a_world_fall_with_bits():
    world = World("two_sided", 10, 29, seed=3)
    structure = STRUCTURES.build(
        {"kind": "rounded", "bits": [2, 4, 8], "group": 8, "rotations": ["both"], "rounding": "feedback"}
    )
    for matrix in world.matrices[:6]:
        problem = world.problem(structure, [matrix])
        error = structure.fit(problem, 3).error.tolist()
        assert error == sorted(error, reverse=True)
