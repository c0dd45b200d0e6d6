"""Statistics of the loss's gradient: those of autograd, of the Fisher information, and the same whatever the batch."""

import pytest
import torch

from tests.conftest import VOCABULARY, pico
from winnow.calibration.gradients import collect_gradients, draws, sampled
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import write_json
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe

WINDOWS = torch.randint(0, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model_and_matrices(saved_model, tmp_path):
    write_json(tmp_path / "model.json", describe(saved_model))
    return load_model(saved_model, "float32", "cpu").double(), ModelFiles(tmp_path / "model.json").matrices


def collected(model, matrices, batch=2, labels="text", **options):
    layers = collect_gradients(model, matrices, WINDOWS, batch, torch.float64, labels, 0, **options)
    return {(layer, role): values for layer, roles in layers for role, values in roles.items()}


def test_moments_are_those_of_autograd(model_and_matrices):
    """For every family: the second moment of the gradient in each output, and the squared gradient of each weight."""
    model, matrices = model_and_matrices
    found = collected(model, matrices)
    outputs, hooks = {}, []
    for m in matrices:
        hooks.append(model.get_submodule(m.module).register_forward_hook(lambda _m, _a, y, n=m.name: outputs.update({n: y})))
    gram, fisher = ({m.name: 0 for m in matrices} for _ in range(2))
    model.requires_grad_(True)
    for window in WINDOWS:
        logits = model(input_ids=window[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        weights = [model.get_submodule(m.module).weight for m in matrices]
        gradients = torch.autograd.grad(loss, [*(outputs[m.name] for m in matrices), *weights])
        for m, g, dw in zip(matrices, gradients, gradients[len(matrices) :], strict=False):
            flat = g.reshape(-1, m.shape[0])
            gram[m.name] += flat.T @ flat
            fisher[m.name] += (dw.T if m.transposed else dw).square().sum(1)
    for m in matrices:
        values = found[m.layer, m.role]
        torch.testing.assert_close(values["gradient_gram"], gram[m.name] / WINDOWS.numel(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(values["fisher"], fisher[m.name] / WINDOWS.numel(), rtol=1e-8, atol=1e-14)


def test_the_batch_changes_nothing_and_drawn_labels_are_the_model_s(model_and_matrices):
    model, matrices = model_and_matrices
    one, other = (collected(model, matrices, batch, "model") for batch in (1, 5))
    for key, values in one.items():
        for name, value in values.items():
            torch.testing.assert_close(value, other[key][name], rtol=1e-8, atol=1e-14)
    text = collected(model, matrices)
    assert not torch.allclose(text[0, "o_proj"]["fisher"], one[0, "o_proj"]["fisher"], rtol=1e-3)


def test_the_first_token_can_be_left_out(model_and_matrices):
    model, matrices = model_and_matrices
    whole, rest = collected(model, matrices), collected(model, matrices, first_token=False)
    gram, inner = (found[1, "down_proj"]["gradient_gram"] for found in (whole, rest))
    first = WINDOWS.numel() * gram - (WINDOWS.numel() - len(WINDOWS)) * inner
    assert int((torch.linalg.eigvalsh(first) > 1e-9 * float(gram.trace())).sum()) <= len(WINDOWS), (
        "one token per window is missing"
    )


def test_labels_are_drawn_with_the_model_s_probabilities():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1, 0.0])).repeat(20_000, 1)
    labels = sampled(logits, draws(0, 0, len(logits)))
    shares = torch.bincount(labels, minlength=4) / len(labels)
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1, 0.0]), atol=0.01, rtol=0)


def test_gradients_that_are_not_finite_are_named(tmp_path):
    model = pico("llama")
    model.save_pretrained(tmp_path / "model")
    write_json(tmp_path / "model.json", describe(tmp_path / "model"))
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"model\.layers\.\d\.\S+: the gradient of its output is not finite"):
        collected(model, ModelFiles(tmp_path / "model.json").matrices)
