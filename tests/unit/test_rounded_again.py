"""Rounding again in the order of the forward pass: exact cases, the same bytes, and the same bits after a killed job."""

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.test_checkpoint import build
from tests.unit.test_recovery import JOB, KEY, KINDS, WINDOWS, Fragile, Killed, compressed, files_of, losses, run
from tests.unit.test_rounded_recovery import ALL, checkpoint_of, module_of
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import MANIFEST, Bundle
from winnow.io.resume import SECONDS, Resume
from winnow.numerics.feedback import codes_of, metric_for
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import multiplied
from winnow.recovery import sequential
from winnow.recovery.base import recovery_of
from winnow.recovery.recover import given_of, write_recovered
from winnow.recovery.reround import form_of, round_again, rounded_of

AGAIN = {"kind": "sequential"}
WEIGHTED = {"kind": "sequential", "outputs": "gradient"}


def of_checkpoint(saved, folder, options, **form):
    """(model files, checkpoint, what a recovery is given at its start)"""
    files, checkpoint = files_of(saved, folder), checkpoint_of(saved, folder / "work", **form)
    return files, checkpoint, given_of(files, checkpoint, WINDOWS, recovery_of(options).options, True, "cpu")


@pytest.mark.parametrize(
    ("options", "grids", "rotation"),
    [
        (AGAIN, "asymmetric", "none"),
        ({**AGAIN, "objective": "shifted"}, "symmetric", "none"),
        (WEIGHTED, "full", "none"),
        (WEIGHTED, "full", "both"),
    ],
)
def test_errors_fall_at_the_same_bytes(saved_llama, tmp_path, options, grids, rotation):
    files, checkpoint, start = of_checkpoint(saved_llama, tmp_path, options, grids=[grids], rotations=[rotation])
    given, report = run(files, checkpoint, options)
    assert all(best <= at for at, best in losses(report))
    assert any(best < at for at, best in losses(report))
    assert set(report["left_as_they_were"]) <= set(given.blocks.values())
    write_recovered(tmp_path / "out", files, checkpoint, given, {"name": "mine", **options}, report, JOB)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.directory, tmp_path / "out"))
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    assert {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])} == {"steps"}
    loaded = load_model(tmp_path / "out", "float32", "cpu")
    with torch.no_grad():
        logits = [m(input_ids=WINDOWS[:2].long()).logits for m in (loaded, given.model)]
    assert torch.equal(*logits), "what is written is what was found"
    forms = [[form_of(m) for m in of.model.modules() if isinstance(m, RoundedLinear)] for of in (start, given)]
    assert forms[0] == forms[1]
    assert {form.grid for form in forms[0]} == {grids}


def test_what_is_fixed_stays(saved_llama, tmp_path):
    options = {**AGAIN, "rounded": "fixed"}
    files, checkpoint, start = of_checkpoint(saved_llama, tmp_path, options)
    given, report = run(files, checkpoint, options)
    states = [of.model.state_dict() for of in (start, given)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert set(given.modules) <= set(report["left_as_they_were"])


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_with_the_dense_inputs_it_is_plain_rounding(zeros, outputs):
    """Both objectives then ask for the rounding that factorisation does, with the stored scales."""
    module, generator = module_of(3, zeros), torch.Generator().manual_seed(3)
    scale, points = module.scales()
    weight, x = torch.randn(6, 10, generator=generator).double(), torch.randn(40, 10, generator=generator).double()
    gram, rows = x.T @ x, torch.cov(torch.randn(6, 30, generator=generator).double()) if outputs else None
    form = form_of(module)
    made = (scale, torch.zeros_like(scale) if points is None else points + form.offset)
    (expected,) = codes_of(weight, [form], [made], metric_for(gram, rows), 4, "plain")
    seen = sequential.Inputs(gram, gram.clone(), x.mean(0), x.mean(0), 40)
    ridged, cross = seen.moments(centred=False)
    anchored = weight + torch.linalg.solve(ridged, weight @ (cross - ridged), left=False)
    for target in (weight, anchored):
        round_again(rounded_of(module), target, seen.plain(centred=False)[0], rows, "again")
        assert torch.equal(module.integers().double(), expected - form.offset)


def test_anchored_is_nearer_to_the_dense_output_than_shifted():
    """Inputs that the compressed model distorts: the error against W x falls, by definition on the calibration tokens."""
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(400, 10, generator=generator).double()
    own = dense + 0.3 * dense @ torch.randn(10, 10, generator=generator).double()
    weight, module = torch.randn(6, 10, generator=generator).double(), module_of(6, False)
    module.scale = torch.full((6, 3), 0.1).half().view(torch.int16)
    seen = sequential.Inputs(own.T @ own, dense.T @ own, own.mean(0), dense.mean(0), 400)
    gram, cross = seen.moments(centred=False)
    errors = []
    for target in (weight, weight + torch.linalg.solve(gram, weight @ (cross - gram), left=False)):
        round_again(rounded_of(module), target, gram, None, "it")
        errors.append(float((dense @ weight.T - own @ module.matrix().double().T).square().sum()))
    assert errors[1] < 0.1 * errors[0]


def test_inputs_that_never_occur_are_rounded_to_nearest():
    """Dead channels and a singular moment: nothing infinite, and no error of the others is moved into them."""
    module, generator = module_of(4, False), torch.Generator().manual_seed(5)
    module.scale = torch.full((6, 3), 0.25).half().view(torch.int16)
    x = torch.randn(3, 10, generator=generator).double()
    x[:, 4:6] = 0
    weight = torch.randn(6, 10, generator=generator).double()
    seen = sequential.Inputs(x.T @ x, x.T @ x, x.mean(0), x.mean(0), 3)
    round_again(rounded_of(module), weight, seen.plain(centred=False)[0], None, "it")
    nearest = (weight / 0.25).round().clamp(-8, 7)
    assert torch.equal(module.integers()[:, 4:6].double(), nearest[:, 4:6])
    own, plain = (
        ((multiplied(c, module.scales()[0].double(), 4) - weight) @ x.T).square().sum()
        for c in (module.integers().double(), nearest)
    )
    assert own < plain
    round_again(rounded_of(module), weight, torch.zeros(10, 10, dtype=torch.float64), None, "it")
    assert torch.equal(module.integers().double(), nearest)


def test_with_many_bits_outputs_hardly_change(saved_llama, tmp_path):
    files, checkpoint, start = of_checkpoint(saved_llama, tmp_path, AGAIN, bits=[8])
    given, _ = run(files, checkpoint, AGAIN)
    with torch.no_grad():
        own, before, dense = (m(input_ids=WINDOWS[:8].long()).logits for m in (given.model, start.model, given.dense))
    assert (own - dense).norm() < 0.02 * dense.norm()
    assert (own - dense).norm() < 1.1 * (before - dense).norm()


def test_a_block_whose_error_does_not_fall_has_its_codes_back(saved_llama, tmp_path, monkeypatch):
    files, checkpoint, start = of_checkpoint(saved_llama, tmp_path, AGAIN)
    monkeypatch.setattr(sequential, "round_again", lambda rounded, *_: rounded.matrix.steps.zero_())
    given, report = run(files, checkpoint, AGAIN)
    assert report["left_as_they_were"] == list(given.blocks.values())
    for key, value in start.model.state_dict().items():
        assert torch.equal(value, given.model.state_dict()[key])


def test_a_killed_job_goes_on_with_the_same_bits(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setenv(SECONDS, "0")
    files, checkpoint, _ = of_checkpoint(saved_llama, tmp_path, WEIGHTED)
    whole, report = run(files, checkpoint, WEIGHTED)
    with pytest.raises(Killed):
        run(files, checkpoint, WEIGHTED, Fragile(tmp_path / "artefact", KEY))
    again, second = run(files, checkpoint, WEIGHTED, Resume(tmp_path / "artefact", KEY))
    states = [given.model.state_dict() for given in (whole, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert report == second


def test_the_remainder_beside_factors_is_rounded_again(saved_llama, tmp_path):
    rest = {"kind": "rounded", "bits": [3], "group": 8, "grids": ["full"]}
    folder = build(saved_llama, tmp_path / "work", ALL, 0.6, "bypass", metric="gram", kept=1, remainder=rest)
    files, checkpoint = files_of(saved_llama, tmp_path), Bundle(folder / MANIFEST)
    start = given_of(files, checkpoint, WINDOWS, recovery_of(AGAIN).options, True, "cpu").model.state_dict()
    given, report = run(files, checkpoint, AGAIN)
    assert any(best < at for at, best in losses(report))
    after = given.model.state_dict()
    assert {key.rpartition("rest.")[2] for key in after if not torch.equal(start[key], after[key])} == {"steps"}
    assert all(rounded_of(given.model.get_submodule(name)) is not None for name in given.modules)


def test_biases_take_up_the_mean_error_of_rounding():
    files, checkpoint = compressed("gpt2", "rounded")
    given, report = run(files, checkpoint, {**AGAIN, "biases": "fitted", "held_out": 0.02})
    assert report["left_as_they_were"] == []
    name, seen = "transformer.h.0.mlp.c_fc", []
    for model in (given.model, given.dense):
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for model in (given.model, given.dense):
            model(input_ids=given.split()[0].long(), use_cache=False)
        own, dense = (of.get_submodule(name)(x) for of, x in zip((given.model, given.dense), seen[:], strict=True))
    assert (own - dense).mean(0).abs().max() < 1e-5 * dense.std(0).max()


@pytest.mark.parametrize("kind", ["rounded", "low_rank"])
def test_experts_are_left_unchanged(kind):
    """They receive other tokens in the compressed model than in the dense one."""
    files, checkpoint = compressed("mixtral", kind)
    given, report = run(files, checkpoint, AGAIN)
    start = load_model(checkpoint.directory, "float32", "cpu").state_dict()
    after = given.model.state_dict()
    changed = {key for key in after if not torch.equal(start[key], after[key])}
    assert changed
    assert all(".self_attn." in key for key in changed)
    experts = {name for name in given.modules if ".experts." in name}
    assert experts
    assert experts <= set(report["left_as_they_were"])


def test_recoveries_follow_each_other(saved_llama, tmp_path):
    """The chain of the presets: rounded again, refined, distilled, each from the checkpoint of the one before."""
    files, checkpoint, _ = of_checkpoint(saved_llama, tmp_path, WEIGHTED)
    total = checkpoint.manifest["model_stored_bytes"]
    for name, options in {"again": WEIGHTED, "refined": KINDS["refine"], "distilled": KINDS["distill"]}.items():
        given, report = run(files, checkpoint, options)
        assert all(best < start for start, best in losses(report))
        write_recovered(tmp_path / name, files, checkpoint, given, {"name": name, **options}, report, JOB)
        checkpoint = Bundle(tmp_path / name / MANIFEST)
        assert checkpoint.manifest["model_stored_bytes"] == total
