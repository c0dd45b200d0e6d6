"""Training of rounded matrices: what is evaluated is what is stored, the loss falls at the same bytes, a killed job goes on."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.unit.test_checkpoint import build
from tests.unit.test_recovery import JOB, KEY, KINDS, WINDOWS, Fragile, Killed, files_of, losses, run
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import MANIFEST, Bundle
from winnow.io.resume import SECONDS, Resume
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import packed, packed_width
from winnow.recovery.base import recovery_of
from winnow.recovery.recover import given_of, write_recovered
from winnow.recovery.rounded import INSIDE, TrainedRounding, rounded_modules, trainable

ALL = ["ffn", "attention"]


def checkpoint_of(source, folder, **options) -> Bundle:
    form = {"bits": [3], "group": 8, "grids": ["full"]} | options
    return Bundle(build(source, folder, ALL, 0.6, "rounded", **form) / MANIFEST)


def module_of(bits: int, zeros: bool, seed: int = 0) -> RoundedLinear:
    """A module of random codes, of 6 x 10 numbers in groups of 4, the first group with a scale of 0."""
    made = torch.Generator().manual_seed(seed)
    module = RoundedLinear(10, 6, bits, 4, bias=False, zeros=zeros)
    half = 2 ** (bits - 1)
    module.steps = packed(torch.randint(-half, half, (6, 10), generator=made).double(), bits)
    scale = torch.randn(6, 3, generator=made)  # of both signs
    scale[0, 0] = 0
    module.scale = scale.half().view(torch.int16)
    if zeros:
        module.zero = packed(torch.randint(-half, half, (6, 3), generator=made).double(), bits)
    return module


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_start_is_the_stored_matrix_to_the_bit(bits, zeros):
    module = module_of(bits, zeros)
    dense = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    for codes in (False, True):
        trained = TrainedRounding(module, codes, dense if codes else None)
        assert torch.equal(trained(), module.matrix())
        steps, scale, origin = trained.stored()
        assert torch.equal(packed(steps, bits), module.steps)
        assert origin is None if not zeros else torch.equal(packed(origin, bits), module.zero)
        assert torch.equal(scale.half().view(torch.int16), module.scale)
    assert module.steps.shape == (6, packed_width(10, bits))


def test_zero_points_are_trained_too(saved_llama, tmp_path):
    """With codes, at a rate so high that some move; what is stored is what was evaluated."""
    files, checkpoint = files_of(saved_llama, tmp_path), checkpoint_of(saved_llama, tmp_path / "work", grids=["asymmetric"])
    options = KINDS["refine"] | {"code_rate": 0.06, "steps": 30}
    given, report = run(files, checkpoint, options)
    assert all(best <= start for start, best in losses(report))
    write_recovered(tmp_path / "out", files, checkpoint, given, {"name": "mine", **options}, report, JOB)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.directory, tmp_path / "out"))
    assert {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])} == {"scale", "steps", "zero"}
    loaded = load_model(tmp_path / "out", "float32", "cpu")
    with torch.no_grad():
        logits = [m(input_ids=WINDOWS[:2].long()).logits for m in (loaded, given.model)]
    assert torch.equal(*logits), "what is written is what was trained"


def test_codes_beside_factors_start_where_the_dense_numbers_lie(saved_llama, tmp_path):
    """And the factors are trained with them, with codes fixed and then with codes."""
    rest = {"kind": "rounded", "bits": [3], "group": 8, "grids": ["full"]}
    folder = build(saved_llama, tmp_path / "work", ALL, 0.6, "bypass", metric="gram", kept=1, remainder=rest)
    files, checkpoint = files_of(saved_llama, tmp_path), Bundle(folder / MANIFEST)
    given = given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["refine"]).options, True, "cpu")
    name = "model.layers.0.mlp.up_proj"
    module, weight = given.model.get_submodule(name), given.dense.get_submodule(name).weight
    steps, scale, _ = module.rest.parts()
    scale = scale.repeat_interleave(8, 1)[:, : weight.shape[1]]
    with trainable(given):
        place = module.rest.trained.place.detach()
    expected = (weight - module.kept.left.weight @ module.kept.right.weight) / scale
    torch.testing.assert_close(place, expected.clamp(steps - INSIDE, steps + INSIDE), rtol=1e-4, atol=1e-4)
    for what in ("scales", "codes"):
        given, report = run(files, checkpoint, KINDS["refine"] | {"rounded": what, "code_rate": 0.02, "norms": True})
        assert all(best < start for start, best in losses(report))
        before, after = load_model(checkpoint.directory, "float32", "cpu").state_dict(), given.model.state_dict()
        changed = {key.rpartition("proj.")[2] for key in after if not torch.equal(before[key], after[key])}
        expected_parts = {"kept.left.weight", "kept.right.weight", "rest.scale"} | ({"rest.steps"} if what == "codes" else set())
        assert {key for key in changed if key.startswith(("kept", "rest"))} == expected_parts
        assert not all(key.startswith(("kept", "rest")) for key in changed), "norms"


def test_a_code_starts_where_the_dense_number_lies_or_near_that_border():
    module = module_of(4, False)
    steps, scale, _ = module.parts()
    shift = torch.full((6, 10), 0.3)
    shift[:, 5:] = 2.0  # feedback has moved these codes away from the nearest
    scales = scale.repeat_interleave(4, 1)[:, :10]
    place = TrainedRounding(module, True, (steps + shift) * scales).place
    expected = torch.where(scales == 0, steps, steps + shift.clamp(max=INSIDE))
    torch.testing.assert_close(place.detach(), expected)


def test_gradients_pass_through_the_rounding():
    module = module_of(3, True)
    trained = TrainedRounding(module, True, None)
    weights = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    (trained() * weights).sum().backward()
    steps, scale, zeros = (part.double() for part in module.parts())
    wide = [part.repeat_interleave(4, 1)[:, :10] for part in (scale, zeros)]
    torch.testing.assert_close(trained.place.grad.double(), wide[0] * weights)
    of_scales = nn.functional.pad((steps - wide[1]) * weights, (0, 2)).unflatten(1, (3, 4)).sum(2) * scale
    torch.testing.assert_close(trained.ratio.grad.double(), of_scales, rtol=1e-4, atol=1e-5)
    assert TrainedRounding(module, False, None).origin is None, "it would move all numbers of a group by a step"
    of_zeros = nn.functional.pad(-weights * wide[0], (0, 2)).unflatten(1, (3, 4)).sum(2)
    torch.testing.assert_close(trained.origin.grad.double(), of_zeros, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["scales", "codes"])
@pytest.mark.parametrize("name", ["refine", "distill", "lora"])
def test_the_loss_falls_at_the_same_bytes(saved_llama, name, what, tmp_path):
    files, checkpoint = files_of(saved_llama, tmp_path), checkpoint_of(saved_llama, tmp_path / "work")
    options = KINDS[name] | {"rounded": what, "code_rate": 0.02, "rate": 3e-3}
    given, report = run(files, checkpoint, options)
    assert losses(report)
    for start, best in losses(report):
        assert best < start
    assert not any("trained" in key for key, _ in given.model.named_parameters())
    write_recovered(tmp_path / "out", files, checkpoint, given, {"name": "mine", **options}, report, JOB)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.directory, tmp_path / "out"))
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    changed = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert changed == ({"scale"} if what == "scales" else {"scale", "steps"})
    loaded = load_model(tmp_path / "out", "float32", "cpu")
    with torch.no_grad():
        logits = [m(input_ids=WINDOWS[:2].long()).logits for m in (loaded, given.model)]
    assert torch.equal(*logits), "what is written is what was trained"


@pytest.mark.parametrize("name", ["refine", "distill", "lora"])
def test_a_killed_recovery_goes_on_with_the_same_bits(saved_llama, name, tmp_path, monkeypatch):
    monkeypatch.setenv(SECONDS, "0")
    files, checkpoint = files_of(saved_llama, tmp_path), checkpoint_of(saved_llama, tmp_path / "work")
    options = KINDS[name] | {"steps": 13}
    whole, report = run(files, checkpoint, options)
    with pytest.raises(Killed):
        run(files, checkpoint, options, Fragile(tmp_path / "artefact", KEY))
    again, second = run(files, checkpoint, options, Resume(tmp_path / "artefact", KEY))
    states = [given.model.state_dict() for given in (whole, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert report == second


def test_after_an_error_the_integers_are_as_before(saved_llama, tmp_path):
    files, checkpoint = files_of(saved_llama, tmp_path), checkpoint_of(saved_llama, tmp_path / "work")
    given = given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["refine"]).options, True, "cpu")
    before = {name: module.steps.clone() for name, module in rounded_modules(given).items()}
    dtypes = dict(given.dtypes)
    with pytest.raises(RuntimeError, match="stop"), trainable(given):
        for module in rounded_modules(given).values():
            module.trained.place.data.add_(1)
        raise RuntimeError("stop")
    assert before
    for name, module in rounded_modules(given).items():
        assert module.trained is None
        assert torch.equal(module.steps, before[name])
    assert given.dtypes == dtypes
