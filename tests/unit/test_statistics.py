"""Statistics: chunks and merges are exact, tokens are counted, and the numbers are those of the inputs."""

import pytest
import torch

from tests.conftest import VOCABULARY, pico
from winnow.calibration import statistics
from winnow.calibration.statistics import Moments, collect
from winnow.io.artifacts import write_json
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.numerics import products
from winnow.numerics.products import gram_of


def moments_of(x, *cuts):
    m = Moments.empty(x.shape[1], x.dtype)
    for part in torch.tensor_split(x, list(cuts)):
        m.accumulate(part)
    return m


def test_chunks_merge_to_the_whole(generator):
    x = torch.randn(101, 7, generator=generator, dtype=torch.float64)
    whole = moments_of(x).finish()
    merged = moments_of(x[:40], 3, 20).merge(moments_of(x[40:], 11)).finish()
    assert int(merged["count"]) == 101
    for name, value in whole.items():
        torch.testing.assert_close(merged[name], value)
    torch.testing.assert_close(whole["gram"], x.T @ x / 101)
    torch.testing.assert_close(whole["mean_abs"], x.abs().mean(0))
    torch.testing.assert_close(whole["rms"], x.square().mean(0).sqrt())
    torch.testing.assert_close(whole["active"], (x > 0).double().mean(0))


def test_float32_products_agree_to_their_precision(generator):
    x = torch.randn(500, 9, generator=generator)
    single, double = Moments.empty(9, torch.float32), Moments.empty(9, torch.float64)
    for part in x.split(64):
        single.accumulate(part)
        double.accumulate(part)
    for name, value in single.finish().items():
        assert value.dtype == (torch.int64 if name == "count" else torch.float32)
        torch.testing.assert_close(value.double(), double.finish()[name].double(), atol=1e-6, rtol=1e-5)


def test_products_by_rows_are_the_product(generator, monkeypatch):
    """Rows of a part, and of what is added at a time, that divide nothing evenly."""
    x, z = torch.randn(50, 23, generator=generator), torch.randn(50, 11, generator=generator)
    whole, parted = (Moments.empty(23, torch.float32, other=11) for _ in range(2))
    whole.accumulate(x, z)
    monkeypatch.setattr(products, "PRODUCT", 23 * 7)
    monkeypatch.setattr(products, "PIECE", 40)
    monkeypatch.setattr(statistics, "PIECE", 40)
    parted.accumulate(x, z)
    expected = whole.finish()
    assert torch.equal(expected["gram"], expected["gram"].T)
    for name, value in parted.finish().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def files_of(folder, tmp_path):
    write_json(tmp_path / "model.json", describe(folder))
    return ModelFiles(tmp_path / "model.json")


def test_statistics_are_those_of_the_inputs(saved_model, tmp_path):
    """For every family: the Gram of each site is that of the inputs its matrices see, whatever the batch."""
    from winnow.checkpoint.loading import load_model

    files = files_of(saved_model, tmp_path)
    model = load_model(saved_model, "float32", "cpu")
    windows = torch.randint(0, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list] = {}
    hooks = [
        model.get_submodule(m.module).register_forward_pre_hook(
            lambda _m, a, name=m.module: seen.setdefault(name, []).append(a[0])
        )
        for m in files.matrices
    ]
    by_batch = [dict(collect(model, files.matrices, windows, batch, torch.float32)) for batch in (6, 4)]
    for hook in hooks:
        hook.remove()
    for matrix in files.matrices:
        parts = seen[matrix.module][:2]  # six windows in two
        x = torch.cat([part.reshape(-1, matrix.shape[1]) for part in parts]).double()
        for sites in by_batch:
            stats = sites[matrix.layer][matrix.site]
            assert int(stats["count"]) == 60
            torch.testing.assert_close(stats["gram"].double(), x.T @ x / 60, atol=1e-6, rtol=1e-4)


def test_the_model_runs_no_further_than_its_last_site(saved_llama, tmp_path):
    files, model, made = files_of(saved_llama, tmp_path), pico("llama"), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: made.append("output of a layer"))
    model.model.norm.register_forward_pre_hook(lambda *_: made.append("norm"))
    list(collect(model, files.matrices, torch.zeros(6, 10, dtype=torch.long), 6, torch.float32))
    assert made == ["output of a layer"] * 2, "of the first of two layers, for two parts of the batch"


def test_cross_moments_and_the_first_token(saved_model, tmp_path):
    """For every family: E[h x^T] of hidden units and FFN inputs; and all statistics without each window's first token."""
    from winnow.checkpoint.loading import load_model

    files, model = files_of(saved_model, tmp_path), load_model(saved_model, "float32", "cpu")
    windows = torch.randint(0, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(0))
    down = next(m for m in files.matrices if m.site == "ffn_hidden")
    up = next(m for m in files.matrices if m.site == "ffn_input")
    seen: dict[str, list[torch.Tensor]] = {}  # the six windows in two parts
    for m in (down, up):
        hook = lambda _m, a, key=m.site: seen[key].append(a[0].reshape(3, 10, -1).double())  # noqa: E731
        model.get_submodule(m.module).register_forward_pre_hook(hook)
    for first_token, kept in ((True, slice(None)), (False, slice(1, None))):
        seen.update(ffn_hidden=[], ffn_input=[])
        sites = dict(collect(model, files.matrices, windows, 6, torch.float64, first_token))[0]
        h, x = (torch.cat(seen[key])[:, kept].flatten(0, 1) for key in ("ffn_hidden", "ffn_input"))
        torch.testing.assert_close(sites["ffn_hidden"]["cross"], h.T @ x / len(x))
        torch.testing.assert_close(sites["ffn_hidden"]["gram"], h.T @ h / len(x))
        torch.testing.assert_close(sites["ffn_input"]["mean"], x.mean(0))
        assert int(sites["ffn_input"]["count"]) == len(x)
        assert "cross" not in sites["ffn_input"]


def test_inputs_that_are_not_finite_are_named(saved_llama, tmp_path):
    files = files_of(saved_llama, tmp_path)
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    windows = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(FloatingPointError, match="layer 1, ffn_hidden"):
        list(collect(model, files.matrices, windows, 2, torch.float64))


@pytest.mark.parametrize("width", [24, 2400])
def test_products_do_not_depend_on_the_number_of_threads(width):
    """2,400 channels make a product that is not parted; 5,000 tokens make three parts."""
    x = torch.randn(5000, width, generator=torch.Generator().manual_seed(0))
    y = x[:, :8] * 2
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((gram_of(x, dtype=torch.float64), gram_of(x, y)))
    finally:
        torch.set_num_threads(before)
    for gram, cross in found:
        torch.testing.assert_close(gram, x.double().T @ x.double(), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(cross, x.T @ y, rtol=1e-4, atol=1e-2)
        if width == 24:
            assert torch.equal(gram, found[0][0])
            assert torch.equal(cross, found[0][1])


def test_a_product_over_no_tokens_is_zero():
    assert torch.equal(gram_of(torch.empty(0, 3)), torch.zeros(3, 3))
