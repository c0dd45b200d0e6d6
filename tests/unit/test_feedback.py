"""Rounding that feeds errors back: GPTQ to the last code, both sides by definition, a descent that never raises its objective."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worlds import World
from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix
from winnow.numerics import descent, wavefront
from winnow.numerics.descent import descend_codes, slopes_of
from winnow.numerics.feedback import codes_of, damped, grids_of, metric_for, objective
from winnow.numerics.grids import Form, forms_of, scaled
from winnow.numerics.rounding import multiplied
from winnow.numerics.wavefront import both_feedback
from winnow.structures.base import STRUCTURES, Problem

GRIDS = ["symmetric", "full", "asymmetric"]


def moments(count: int, generator: torch.Generator, samples: int = 0) -> torch.Tensor:
    x = torch.randn(count, samples or 2 * count, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-2, 1, count, dtype=torch.float64)[torch.randperm(count, generator=generator), None]
    return x @ x.T / x.shape[1]


def problem_of(m: int, n: int, seed: int, samples: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, C, F); with fewer samples than n, C is singular."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64), moments(n, generator, samples), moments(m, generator)


def gptq(w: np.ndarray, gram: np.ndarray, levels: tuple[int, int], scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """The codes of the paper's column loop (its equations 2 to 4 and the Cholesky form), with `act_order`, static groups and 1 %
    of damping; scales and zeros (m, n) of every number. Written from the paper, nothing of winnow in it."""
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram[np.ix_(order, order)] + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w, codes = w[:, order].copy(), np.zeros_like(w)
    for j, source in enumerate(order):
        scale = scales[:, source]
        codes[:, source] = np.clip(np.rint(w[:, j] / scale + zeros[:, source]), *levels)
        error = (w[:, j] - (codes[:, source] - zeros[:, source]) * scale) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes


@pytest.mark.parametrize(
    ("n", "group", "samples"), [(1, 4, 0), (7, 4, 0), (40, 16, 0), (200, 64, 0), (300, 128, 60), (130, 130, 0)]
)
def test_codes_are_those_of_gptq(n, group, samples):
    """To the last one: also where no block and no group divides the width, with a singular Gram, and with an unseen channel."""
    w, gram, _ = problem_of(9, n, seed=n, samples=samples)
    if n > 100:
        gram[5] = gram[:, 5] = 0
    forms = [Form(bits, grid, min(group, n)) for bits, grid in product((2, 3, 4, 8), GRIDS)]
    made = [scaled(w, form, "largest", torch.ones(n, dtype=w.dtype)) for form in forms]
    codes = codes_of(w, forms, made, metric_for(gram, None), 0, "it")
    for form, (scales, zeros), found in zip(forms, made, codes, strict=True):
        wide = [part.double().repeat_interleave(form.group, 1)[:, :n].numpy() for part in (scales, zeros)]
        assert np.array_equal(found.numpy(), gptq(w.numpy(), gram.numpy(), form.codes, *wide)), form


def entry_by_entry(w: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, grids, low: float, high: float) -> torch.Tensor:
    """(m, n): codes that make |(S^T D R)_ij| least, one after the other by columns, S S^T = F and R R^T = C upper triangular."""
    roots = [torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1) for metric in (rows, columns)]
    change, codes = torch.zeros_like(w), torch.zeros_like(w)
    values = torch.arange(low, high + 1, dtype=w.dtype)
    for j, i in product(range(w.shape[1]), range(w.shape[0])):
        scale, zero = grids.scales[0, i, j], grids.zeros[0, i, j]
        before = roots[0][:, i] @ change @ roots[1][:, j]
        best = (before + roots[0][i, i] * roots[1][j, j] * ((values - zero) * scale - w[i, j])).abs().argmin()
        codes[i, j] = values[best]
        change[i, j] = (codes[i, j] - zero) * scale - w[i, j]
    return codes


@pytest.mark.parametrize(
    ("shape", "tile", "block"),
    [((1, 1), 32, 128), ((5, 9), 32, 128), ((9, 5), 4, 4), ((11, 13), 2, 4), ((14, 25), 2, 4), ((25, 14), 2, 6), ((3, 30), 1, 2)],
)
def test_feedback_on_both_sides_is_its_definition(shape, tile, block, monkeypatch):
    """Also where no tile divides a side, and with several blocks of several tiles."""
    monkeypatch.setattr(wavefront, "TILE", tile)
    monkeypatch.setattr(wavefront, "BLOCK", block)
    w, gram, other = problem_of(*shape, seed=sum(shape))
    metric = metric_for(gram, other)
    for form in (Form(3, "full", 4), Form(2, "asymmetric", 8)):
        grids = grids_of([form], [scaled(w, form, "largest", torch.ones(shape[1], dtype=w.dtype))], shape[1])
        found = grids.nearest(w + both_feedback(w, grids, metric.rows, metric.columns))[0]
        assert torch.equal(found, entry_by_entry(w, metric.rows, metric.columns, grids, *form.codes))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(2, 4),
    st.sampled_from(GRIDS),
    st.integers(0, 2**20),
    st.sampled_from([(3, 2), (4, 4), (128, 16)]),
)
def test_the_descent_never_raises_the_objective(m, n, bits, grid, seed, block):
    w, gram, other = problem_of(m, n, seed)
    metric, form = metric_for(gram, other), Form(bits, grid, min(8, n))
    grids = grids_of([form], [scaled(w, form, "largest", torch.ones(n, dtype=w.dtype))], n)
    change = grids.values(grids.nearest(w)) - w
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "BLOCK", block[0])
        patch.setattr(descent, "INNER", block[1])
        for sweeps in (1, 2, 1):
            sides = metric.rows, metric.columns
            lower, by = descend_codes(w, grids, *sides, change, slopes_of(change, *sides), sweeps)
            before, after = (float(objective(d, *sides)) for d in (change, lower))
            assert after <= before * (1 + 1e-12)
            assert float(by) == pytest.approx(before - after, rel=1e-9, abs=1e-12 * before)
            codes = grids.nearest(w + lower)
            torch.testing.assert_close(grids.values(codes), w + lower, rtol=1e-12, atol=1e-12)
            change = lower


def best_of_all(w: torch.Tensor, grids, rows: torch.Tensor, columns: torch.Tensor, low: int, high: int) -> float:
    every = torch.tensor(list(product(range(low, high + 1), repeat=w.numel())), dtype=w.dtype).reshape(-1, *w.shape)
    return float(objective((every - grids.zeros) * grids.scales - w, rows, columns).min())


def test_it_is_mostly_the_best_of_all_codes_of_tiny_matrices():
    """Nearest, feedback and descent against all 4^6: never below the best of all, and in most cases it."""
    hits, ratio = {"nearest": 0, "both": 0}, []
    for seed in range(40):
        w, gram, other = problem_of(2, 3, seed)
        metric, form = metric_for(gram, other), Form(2, "full", 3)
        made = [scaled(w, form, "largest", torch.ones(3, dtype=w.dtype))]
        grids = grids_of([form], made, 3)
        best = best_of_all(w, grids, metric.rows, metric.columns, *form.codes)
        for name, codes in (("nearest", grids.nearest(w)), ("both", codes_of(w, [form], made, metric, 4, "it"))):
            found = float(objective(grids.values(codes) - w, metric.rows, metric.columns))
            assert found >= best * (1 - 1e-9)
            hits[name] += found <= best * (1 + 1e-9)
        ratio.append(found / best)
    assert hits["both"] >= 30
    assert hits["nearest"] < 20
    assert sum(ratio) / len(ratio) < 1.2


@pytest.mark.parametrize("kind", ["weights", "second_moment", "fisher", "gram", "two_sided"])
def test_the_metric_decides(kind):
    """Diagonal metrics round to nearest; a full one loses less in it than nearest does, and the two-sided less than GPTQ does."""
    world = World(kind, 24, 40, seed=1)
    spec = {"kind": "rounded", "bits": [2, 3, 4], "group": 8, "grids": ["full"]}
    plain, fed = STRUCTURES.build(spec), STRUCTURES.build({**spec, "rounding": "feedback"})
    for matrix in world.matrices[:6]:
        problem = world.problem(plain, [matrix])
        one, other = plain.fit(problem, 3), fed.fit(problem, 3)
        if kind in ("gram", "two_sided"):
            assert float(other.error[1:].sum()) < 0.9 * float(one.error[1:].sum())
        else:
            assert torch.equal(one.error, other.error)
            assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        if kind == "two_sided":
            gram = Problem([matrix], problem.weights, problem.sites, METRICS.build({"kind": "gram"}))
            codes = fed.fit(gram, 3).tensors
            losses = [fed.predicted(problem, tensors)[1:] for tensors in (codes, other.tensors)]
            assert (losses[1] < losses[0]).all()


def test_a_metric_that_its_own_rounding_makes_indefinite_is_damped_more():
    _, gram, _ = problem_of(4, 12, seed=3, samples=5)
    assert torch.equal(damped(torch.zeros(3, 3)), torch.eye(3))
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -0.05 * gram.diagonal().mean()
    found = damped((vectors * values) @ vectors.T)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    assert float((found - gram).diagonal().mean() / gram.diagonal().mean()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(("bits", "grid", "group"), [*product((2, 3, 4, 8), GRIDS, (4, 32, 70))])
def test_grids_use_all_their_codes_and_move_numbers_half_a_step(bits, grid, group):
    w = torch.randn(200, 70, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    w[2], w[3] = 0, 0.25
    form = Form(bits, grid, group)
    scales, zeros = scaled(w, form, "largest", torch.ones(70, dtype=w.dtype))
    grids = grids_of([form], [(scales, zeros)], 70)
    codes = grids.nearest(w)[0]
    (low, high), half_of_all = form.codes, 2 ** (bits - 1)
    ends = {"symmetric": (1 - half_of_all, half_of_all - 1), "full": (-half_of_all, half_of_all - 1)}
    assert (low, high) == ends.get(grid, (0, 2 * half_of_all - 1))
    assert (float(codes.min()), float(codes.max())) == (low, high)
    kept = multiplied(codes, scales.double(), group, zeros)
    torch.testing.assert_close(kept, grids.values(codes[None])[0], rtol=0, atol=0)
    error, half = (kept - w).abs(), grids.scales[0].abs() / 2
    # A full grid is a step short on the other side; a zero point that is a whole number is off by up to half a step.
    reach = {"symmetric": 1.0, "full": 2.0, "asymmetric": 2.0}[grid]
    assert (error <= reach * half * (1 + 1e-9)).all()
    assert not error[2].any()
    assert (error <= half * (1 + 1e-9)).double().mean() > 0.9


@pytest.mark.parametrize(("bits", "grid"), [*product((2, 3, 4), GRIDS)])
def test_unbiased_scales_do_not_shrink_the_matrix(bits, grid):
    """What is kept along every group, after rounding to the new scales: nearer to all of it than what least squares keeps, and
    little is lost by that."""
    generator = torch.Generator().manual_seed(bits)
    w, columns = torch.randn(300, 64, generator=generator, dtype=torch.float64), torch.rand(64, generator=generator).double()
    form, found = Form(bits, grid, 32), {}
    for search in ("largest", "searched", "unbiased"):
        scales, zeros = scaled(w, form, search, columns)
        grids = grids_of([form], [(scales, zeros)], 64)
        kept = grids.values(grids.nearest(w))[0]
        along, own = (((part * w * columns).unflatten(1, (-1, 32)).sum(2)) for part in (kept, w))
        found[search] = (float(along.sum() / own.sum()), float(((kept - w).square() * columns).sum()))
    assert found["searched"][0] < 1 - 0.1 * 4.0**-bits
    assert abs(1 - found["unbiased"][0]) < 0.6 * abs(1 - found["searched"][0])
    assert found["unbiased"][1] < (1.15 if bits == 2 else 1.05) * found["searched"][1]
    assert found["unbiased"][1] < found["largest"][1]


def test_sizes_are_all_forms_by_their_bytes():
    forms = forms_of(64, 100, [2, 3], ["full", "asymmetric"], [32, 128, None], ["none"])
    assert [(form.bits, form.grid, form.group, form.row_bytes(100)) for form in forms] == [
        (2, "full", 100, 25 + 2),
        (2, "asymmetric", 100, 25 + 2 + 1),
        (2, "full", 32, 25 + 8),
        (2, "asymmetric", 32, 25 + 8 + 1),
        (3, "full", 100, 38 + 2),
        (3, "asymmetric", 100, 38 + 2 + 1),
        (3, "full", 32, 38 + 8),
        (3, "asymmetric", 32, 38 + 8 + 2),
    ]
    matrix = Matrix(0, "up_proj", "layers.0.up_proj", "ffn_input", (64, 100), False, False)
    structure = STRUCTURES.build({"kind": "rounded", "bits": [2, 3], "group": [32, 128, None], "grids": ["full", "asymmetric"]})
    assert structure.limit([matrix]) == 8
    assert [structure.index_bytes([matrix], size) for size in range(1, 9)] == [64 * form.row_bytes(100) for form in forms]
