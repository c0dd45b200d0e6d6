"""Peers' ways to choose grids: HQQ's zero points and AWQ's channel scales."""

import pytest
import torch

from winnow.engines.gguf.blocks import Grid
from winnow.numerics.grids import Form
from winnow.numerics.linalg import weighted_error
from winnow.numerics.peers import NORM, channel_matrix, half_quadratic, nearest, scaled_channels
from winnow.numerics.rounding import grouped, in_float16, multiplied


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebuilt(weight, form, scales, zeros):
    return multiplied(nearest(weight, form, scales, zeros), scales.double(), form.group, zeros.double())


@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 8), (3, 5), (4, 20), (8, 5)])
def test_zero_points_are_never_worse_than_at_the_start(bits, group):
    weight, form = normal(6, 20).pow(3), Form(bits, "asymmetric", group)
    scales, zeros = half_quadratic(weight, form)
    parts = grouped(weight, group)
    real = grouped(torch.ones_like(weight), group) > 0
    start = (-parts.where(real, torch.inf).amin(2) / scales.double()).half()

    def errors(points):
        return grouped(weight - rebuilt(weight, form, scales, points), group).abs().pow(NORM).sum(2)

    assert (errors(zeros) <= errors(start) + 1e-12).all()
    assert bits > 4 or (errors(zeros) < errors(start) - 1e-6).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_on_the_grid_are_kept(bits):
    codes = torch.randint(0, 2**bits, (5, 12), generator=torch.Generator().manual_seed(bits)).double()
    codes[:, ::6], codes[:, 1::6] = 0, 2**bits - 1  # every group reaches both ends
    weight, form = (codes - 1.25) * 0.125, Form(bits, "asymmetric", 6)
    scales, zeros = half_quadratic(weight, form)
    assert torch.equal(rebuilt(weight, form, scales, zeros), weight)


def test_constant_rows_and_one_column():
    weight = torch.tensor([[0.0], [-0.3], [2.5], [1e-6]], dtype=torch.float64)
    for columns in (1, 7):
        wide, form = weight.expand(4, columns), Form(2, "asymmetric", min(4, columns))
        found = rebuilt(wide, form, *half_quadratic(wide, form))
        torch.testing.assert_close(found, wide, rtol=2**-11, atol=2**-24)


def test_numbers_that_float16_does_not_hold_are_refused():
    with pytest.raises(ValueError, match="float16, in which"):
        half_quadratic(torch.full((2, 4), 1e6, dtype=torch.float64), Form(4, "asymmetric", 4))


def test_channel_scales_help_and_never_hurt():
    weight, form = normal(16, 24), Form(3, "asymmetric", 8)
    x = normal(24, 300, seed=1) * torch.logspace(-2, 1, 24, dtype=torch.float64)[:, None]
    gram, sizes = x @ x.T / 300, x.abs().mean(1)
    for rows in (None, torch.eye(16, dtype=torch.float64)):
        factors = scaled_channels(weight, form, sizes, gram, rows)
        errors = [
            float(weighted_error(weight - channel_matrix(weight, form, f), gram, rows)) for f in (factors, factors.new_ones(24))
        ]
        assert errors[0] < 0.7 * errors[1]
    level = torch.ones(24, dtype=torch.float64)
    assert torch.equal(scaled_channels(weight, form, level, gram, None), level.half())  # nothing to scale by
    assert torch.equal(scaled_channels(weight, form, 0 * level, gram, None), level.half())  # a site without input


def test_channels_are_not_scaled_where_rounding_loses_nothing():
    codes = torch.randint(0, 8, (5, 8), generator=torch.Generator().manual_seed(0)).double()
    codes[:, 0], codes[:, 1] = 0, 7
    weight, form, sizes = (codes - 3) * 0.25, Form(3, "asymmetric", 8), torch.logspace(-1, 1, 8, dtype=torch.float64)
    factors = scaled_channels(weight, form, sizes, sizes.square(), None)
    assert torch.equal(factors, torch.ones_like(factors))
    assert torch.equal(channel_matrix(weight, form, factors), weight)


def test_channels_without_input_stay_finite():
    weight, form = normal(4, 6), Form(2, "asymmetric", 6)
    sizes = torch.tensor([0.0, 1e-12, 1.0, 2.0, 1e3, 0.0], dtype=torch.float64)
    factors = scaled_channels(weight, form, sizes, sizes.square(), None).double()
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()


def test_codes_with_real_zero_points_fit_no_block_of_gguf():
    scales = in_float16(torch.ones(1, 1, dtype=torch.float64))
    assert Grid(torch.full((1, 32), 3.0), scales).type() is not None
    assert Grid(torch.full((1, 32), 3.25), scales).type() is None
