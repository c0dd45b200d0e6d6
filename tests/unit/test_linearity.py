"""Linear recoverability: exact on linear maps, invariant, and the same from moments as from rows."""

import pytest
import torch
from torch import nn

from tests.conftest import pico
from winnow.models.architectures import matrices_of
from winnow.studies.linearity.recoverability import (
    Sums,
    affine_module,
    bilinear_gain,
    collect_sums,
    ffn_blocks,
    least_squares,
    r2_scores,
    rank_for_share,
    reduced_rank,
    swapped,
    total,
    train_affine,
)

D = 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, TEST = randn(400, D, seed=1), randn(100, D, seed=2) + 0.3
TRUE, NOISE = randn(D, D, seed=3), randn(500, D, seed=4)


def outputs(x, noise):
    return x @ TRUE + 0.7 + noise * (x @ TRUE).square().mean() * 0.1 * NOISE[: len(x)]


def test_moments_give_what_rows_give():
    y, y_test = outputs(X, 1.0), outputs(TEST, 1.0)

    def ones(x):
        return torch.cat([x, torch.ones(len(x), 1).double()], 1)

    direct = torch.linalg.lstsq(ones(X), y).solution
    fit = least_squares(total(Sums.of(x, part) for x, part in zip(X.split(150), y.split(150), strict=True)))
    torch.testing.assert_close(fit, direct)
    left = (y_test - ones(TEST) @ direct).square()
    found = r2_scores(fit, Sums.of(TEST, y_test))
    assert found["scalar"] == pytest.approx(1 - float(left.sum() / (y_test - y_test.mean()).square().sum()))
    assert found["feature"] == pytest.approx(1 - float(left.sum() / (y_test - y_test.mean(0)).square().sum()))
    assert found["scalar"] >= found["feature"] - 1e-12, "offsets of outputs count as explained"
    both = Sums.of(X, y) - Sums.of(X[:10], y[:10])
    torch.testing.assert_close(both.xy, Sums.of(X[10:], y[10:]).xy)


def test_a_linear_block_is_recovered_and_a_change_of_inputs_changes_nothing():
    train, test = Sums.of(X, outputs(X, 0.0)), Sums.of(TEST, outputs(TEST, 0.0))
    assert all(value == pytest.approx(1, abs=1e-10) for value in r2_scores(least_squares(train), test).values())
    noisy, mixing = (outputs(X, 1.0), outputs(TEST, 1.0)), randn(D, D, seed=9)
    plain = r2_scores(least_squares(Sums.of(X, noisy[0])), Sums.of(TEST, noisy[1]))
    mixed = r2_scores(least_squares(Sums.of(X @ mixing, noisy[0])), Sums.of(TEST @ mixing, noisy[1]))
    assert mixed == pytest.approx(plain)


def test_reduced_rank_of_full_rank_is_least_squares_and_train_error_falls():
    y, y_test = outputs(X, 1.0), outputs(TEST, 1.0)
    train, test = Sums.of(X, y), Sums.of(TEST, y_test)
    profile = reduced_rank(train, test)
    assert len(profile) == D + 1
    assert profile[-1] == pytest.approx(r2_scores(least_squares(train), test)["feature"])
    own = reduced_rank(train, train)
    assert own == sorted(own)
    assert own[0] == pytest.approx(0, abs=1e-12)
    fit = least_squares(train)[:-1]
    predictions = (X - X.mean(0)) @ fit
    v = torch.linalg.svd(predictions, full_matrices=False).Vh[:2].T
    shown = y_test.mean(0) * 0 + y.mean(0) + (TEST - X.mean(0)) @ fit @ v @ v.T
    by_rows = 1 - float((y_test - shown).square().sum() / (y_test - y_test.mean(0)).square().sum())
    assert profile[2] == pytest.approx(by_rows)
    assert rank_for_share([0.0, 0.5, 0.95, 1.0], 0.9) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_blocks_are_tapped_and_swapped_in_every_family(family):
    model = pico(family).eval()
    shapes = {name: {"shape": list(p.shape)} for name, p in model.named_parameters()}
    blocks = ffn_blocks(matrices_of(model.config.model_type, shapes))
    assert len(blocks) == model.config.num_hidden_layers
    ids = torch.randint(0, 60, (6, 12), generator=torch.Generator().manual_seed(0))
    sums = collect_sums(model, blocks, ids, 3, 2)
    for block in blocks:
        assert [round(pair[0].count) for pair in sums[block.layer]] == [24, 24, 24]
        assert [round(pair[1].count) for pair in sums[block.layer]] == [2, 2, 2]
    width = model.config.hidden_size
    zero = affine_module(torch.zeros(width + 1, width, dtype=torch.float64))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with swapped(model, blocks[0], zero, 12):
            removed = model(input_ids=ids).logits
        leaves = model.get_submodule(blocks[0].leaves)
        kept = {name: p.clone() for name, p in leaves.named_parameters()}
        for p in leaves.parameters():
            p.zero_()
        torch.testing.assert_close(model(input_ids=ids).logits, removed)
        for name, p in leaves.named_parameters():
            p.copy_(kept[name])
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=0, rtol=0)
    assert float((removed - before).abs().max()) > 1e-4


def test_the_trained_map_nears_least_squares_and_a_bilinear_residual_is_found():
    x, y = X.float(), outputs(X, 0.0).float()
    steps = train_affine(x, y, 1000, 500, 0.02, 0)
    test = Sums.of(TEST, outputs(TEST, 0.0))
    values = [r2_scores(fit, test)["feature"] for _, fit in steps]
    assert values[0] < 0.9 < values[-1]

    def curved(x):
        return (x @ TRUE + (x[:, :1] * x[:, 1:2]) @ torch.ones(1, D, dtype=x.dtype)).float()

    parts = [(p.float(), curved(p)) for p in (randn(2000, D, seed=5), randn(500, D, seed=6), randn(500, D, seed=7))]
    fit = least_squares(Sums.of(*parts[0]))
    assert bilinear_gain(parts, fit, 4, 1500, 0) > 0.05
    straight = [(x, (x.double() @ TRUE).float()) for x, _ in parts]
    assert abs(bilinear_gain(straight, least_squares(Sums.of(*straight[0])), 4, 400, 0)) < 1e-3
    assert isinstance(affine_module(fit), nn.Linear)
