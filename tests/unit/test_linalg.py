"""The weighted low-rank routine against exact identities (numbers T1 to T9 as in the methods reference)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.numerics import linalg
from winnow.numerics.linalg import finite, leading_directions, regularized, sandwich

SHAPES = st.tuples(st.integers(2, 24), st.integers(2, 24))
torch.set_default_dtype(torch.float32)


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(x):
    return x @ x.T / x.shape[1]


def approximation(found, k):
    return found.left[:, :k] @ found.right[:k]


def output_error(weight, approx, gram):
    rest = weight - approx
    return float(torch.trace(rest @ gram @ rest.T))


def cholesky_svd(weight, gram, k):
    """The published recipe (SVD-LLM): Cholesky factor, SVD, inverse."""
    lower = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(weight @ lower, full_matrices=False)
    return torch.linalg.solve_triangular(lower, (u[:, :k] * s[:k]) @ vh[:k], upper=False, left=False)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 10**6))
def test_plain_metric_is_eckart_young(shape, seed):
    weight = random(shape, seed)
    found = leading_directions(weight, weight.new_ones(shape[1]))
    expected = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found.spectrum, expected)
    for k in range(min(shape) + 1):
        left = (weight - approximation(found, k)).square().sum()
        torch.testing.assert_close(left, expected[k:].square().sum(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(found.error[k], left, atol=1e-10, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 10**6))
def test_whitened_agrees_with_cholesky_and_svd(shape, seed):
    weight, x = random(shape, seed), random((shape[1], 8 * shape[1]), seed + 1)
    gram = gram_of(x)
    found = leading_directions(weight, gram)
    torch.testing.assert_close(found.spectrum, torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram)), atol=1e-8, rtol=1e-8)
    for k in range(1, min(shape)):
        ours = output_error(weight, approximation(found, k), gram)
        theirs = output_error(weight, cholesky_svd(weight, gram, k), gram)
        assert ours == pytest.approx(theirs, rel=1e-9), (k, shape)
        assert float(found.error[k]) == pytest.approx(ours, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 12), st.integers(0, 3), st.integers(0, 10**6))
def test_singular_gram_gives_finite_optimal_factors(shape, tokens, dead, seed):
    """Fewer tokens than channels, and dead channels: finite, optimal at every rank, and the full rank gives W back."""
    weight, x = random(shape, seed), random((shape[1], tokens), seed + 1)
    x[: min(dead, shape[1] - 1)] = 0
    gram = gram_of(x)
    found = leading_directions(weight, gram)
    assert torch.isfinite(found.right).all()
    assert found.left.shape == (shape[0], min(shape))
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(min(shape), dtype=torch.float64), atol=1e-10, rtol=0)
    best = torch.linalg.svdvals(weight @ x / tokens**0.5).square()
    total = float(best.sum())
    for k in range(min(shape) + 1):
        assert output_error(weight, approximation(found, k), gram) == pytest.approx(
            float(best[k:].sum()), abs=1e-10 * max(total, 1)
        )
        assert float(found.error[k]) == pytest.approx(float(best[k:].sum()), abs=1e-10 * max(total, 1))
    torch.testing.assert_close(approximation(found, min(shape)), weight, atol=1e-10, rtol=1e-10)


def test_directions_beyond_the_gram_reduce_the_weight_error():
    """With a Gram of rank 1, rank 2 and more are spent on the weights themselves."""
    weight, x = random((9, 6), 1), random((6, 1), 2)
    found = leading_directions(weight, gram_of(x))
    rest = weight - approximation(found, 1)
    tail = torch.linalg.svdvals(rest).square()
    for k in range(1, 6):
        left = float((weight - approximation(found, k)).square().sum())
        assert left == pytest.approx(float(tail[k - 1 :].sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_identity_gram_and_scale_change_nothing(shape):
    weight = random(shape, 3)
    plain = leading_directions(weight, weight.new_ones(shape[1]))
    full = leading_directions(weight, 1e6 * torch.eye(shape[1], dtype=torch.float64))
    diagonal = leading_directions(weight, weight.new_full((shape[1],), 1e-6))
    for k in (1, 3, 6):
        torch.testing.assert_close(approximation(full, k), approximation(plain, k))
        torch.testing.assert_close(approximation(diagonal, k), approximation(plain, k))


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_each_metric_wins_in_its_own_currency(shape):
    weight, x = random(shape, 4), random((shape[1], 200), 5)
    x *= torch.logspace(0, 2, shape[1], dtype=torch.float64)[:, None]
    gram = gram_of(x)
    plain = approximation(leading_directions(weight, weight.new_ones(shape[1])), 4)
    whitened = approximation(leading_directions(weight, gram), 4)
    assert output_error(weight, whitened, gram) < output_error(weight, plain, gram)
    assert (weight - plain).square().sum() < (weight - whitened).square().sum()


def test_scales_over_eight_orders_of_magnitude():
    """Channels from 1e-4 to 1e4: the error is that of the exact solution, relative to the whole."""
    weight, x = random((20, 12), 6), random((12, 400), 7)
    x *= torch.logspace(-4, 4, 12, dtype=torch.float64)[:, None]
    gram = gram_of(x)
    found = leading_directions(weight, gram)
    best = torch.linalg.svdvals(weight @ x / 20).square()
    for k in range(13):
        assert output_error(weight, approximation(found, k), gram) == pytest.approx(
            float(best[k:].sum()), abs=1e-12 * float(best.sum())
        )


@pytest.mark.parametrize("library", [np.linalg, torch.linalg])
@pytest.mark.parametrize("shape", [(10, 6), (6, 10), (8, 8)])
def test_singular_vectors_do_not_need_the_lapack_that_fails_on_some(shape, library, monkeypatch):
    matrix = random(shape, 8) @ torch.diag(torch.arange(shape[1]) < 4).double()
    expected = torch.linalg.svdvals(matrix)

    def gives_up(*_, **__):
        raise library.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(library, "svd", gives_up)
    found = linalg.left_singular(matrix)
    assert found.shape == (shape[0], min(shape))
    torch.testing.assert_close(found.T @ found, torch.eye(min(shape), dtype=torch.float64))
    torch.testing.assert_close((found.T @ matrix).norm(dim=1), expected)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
def test_rank_deficient_weights(shape, rank, full, seed):
    """Zero rows and low rank: the directions stay orthonormal, and every rank beyond gives W back."""
    weight = random((shape[0], rank), seed) @ random((rank, shape[1]), seed + 1)
    weight[: shape[0] // 2] = 0
    columns = gram_of(random((shape[1], 50), seed + 2)) if full else random((shape[1],), seed + 2).square() + 0.1
    found = leading_directions(weight, columns)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(min(shape), dtype=torch.float64), atol=1e-10, rtol=0)
    scale = float(weight.square().sum())
    for k in range(rank, min(shape) + 1):
        assert float((weight - approximation(found, k)).square().sum()) <= 1e-18 * scale
        assert float(found.error[k]) <= 1e-12 * float(found.error[0])


def test_statistics_in_float32_leave_the_noise_to_the_weights():
    """A Gram of 20 tokens stored in float32: rank 30 is as good in the weights as with the exact Gram."""
    weight, x = random((64, 128), 1), random((128, 20), 2)
    exact = gram_of(x)
    errors = []
    for gram, precision in ((exact, 2.0**-52), (exact.float().double(), 2.0**-23)):
        found = leading_directions(weight, gram, precision)
        assert output_error(weight, approximation(found, 30), exact) <= 1e-5 * output_error(weight, 0 * weight, exact)
        errors.append(float((weight - approximation(found, 30)).square().sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_zero_weight_and_zero_metric():
    for weight, gram in ((torch.zeros(4, 6), torch.eye(6)), (torch.ones(4, 6), torch.zeros(6, 6))):
        found = leading_directions(weight.double(), gram.double())
        assert float(found.spectrum.abs().max()) == 0
        assert float(found.error[0]) == 0
        torch.testing.assert_close(approximation(found, 4), weight.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad):
    weight, gram = random((4, 6), 8), torch.eye(6, dtype=torch.float64)
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        leading_directions(broken, gram)
    gram[0, 0] = bad
    with pytest.raises(FloatingPointError, match="metric is not finite"):
        leading_directions(weight, gram)


def test_a_ridge_is_raised_until_it_helps_and_says_so(caplog):
    x = random((12, 5), 1)
    singular = x @ x.T
    with caplog.at_level("WARNING"):
        found = regularized(singular, 1e-18, "the moment of layer 3")
    assert int(torch.linalg.cholesky_ex(found).info) == 0
    assert "the moment of layer 3: singular, so the relative ridge was raised from 1.0e-18 to" in caplog.text
    caplog.clear()
    definite = singular + torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(regularized(definite, 1e-6, "x"), definite + 1e-6 * definite.diagonal().mean() * torch.eye(12))
    diagonal = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    assert (regularized(diagonal, 0.0, "y") > 0).all()
    assert "y: singular" in caplog.text


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(3, 3, dtype=torch.float64), "z: is zero"),
        (torch.full((3, 3), float("nan"), dtype=torch.float64), "z: not finite"),
        (torch.diag(torch.tensor([1.0, 1.0, -1.9], dtype=torch.float64)), "z: singular even with a ridge of 1 %"),
    ],
)
def test_what_no_ridge_mends_is_refused(gram, message):
    with pytest.raises(FloatingPointError, match=message):
        regularized(gram, 1e-6, "z")


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 10**6))
def test_two_sided_is_the_svd_between_the_roots(shape, seed):
    """R^{-1/2} SVD_k(R^{1/2} W C^{1/2}) C^{-1/2}, for full and for diagonal R."""
    weight, x, g = random(shape, seed), random((shape[1], 9 * shape[1]), seed + 1), random((shape[0], 9 * shape[0]), seed + 2)
    columns = gram_of(x)
    for rows in (gram_of(g), gram_of(g).diagonal()):
        full = rows if rows.dim() == 2 else torch.diag(rows)
        left, right = torch.linalg.cholesky(full), torch.linalg.cholesky(columns)
        u, s, vh = torch.linalg.svd(left.T @ weight @ right, full_matrices=False)
        found = leading_directions(weight, columns, rows=rows)
        torch.testing.assert_close(found.spectrum, s, atol=1e-8, rtol=1e-7)
        for k in range(1, min(shape)):
            if s[k - 1] - s[k] < 1e-6 * s[0]:
                continue
            expected = torch.linalg.solve(left.T, (u[:, :k] * s[:k]) @ vh[:k]) @ torch.linalg.inv(right)
            torch.testing.assert_close(approximation(found, k), expected, atol=1e-6, rtol=1e-5)


def test_products_by_halves_are_the_products():
    """At 700 columns in three blocks, so that diagonal, whole and last blocks count."""
    weight, x = random((40, 700), 1), random((90, 700), 2)
    gram = x.T @ x
    torch.testing.assert_close(linalg.gram_of(x), gram)
    torch.testing.assert_close(linalg.gram_of(x, x[:, :5]), gram[:, :5])
    torch.testing.assert_close(linalg.gram_of(x.bfloat16(), dtype=torch.float64), x.bfloat16().double().T @ x.bfloat16().double())
    torch.testing.assert_close(sandwich(weight, gram), weight @ gram @ weight.T)
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not finite(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (400, 400)])
@pytest.mark.parametrize("precision", [2.0**-52, 2.0**-23])
def test_error_is_the_optimum_at_every_rank_in_both_precisions(shape, precision):
    """Shapes of several blocks: the excess over the optimum is rounding, also with statistics of float32."""
    weight, x = random(shape, 3), random((shape[1], 3 * shape[1]), 4)
    x *= torch.logspace(0, -3, shape[1], dtype=torch.float64)[:, None]
    x[:, :1] *= 100  # one massive token, and a massive channel
    x[5] *= 100
    gram = gram_of(x)
    gram = gram.float().double() if precision > 1e-10 else gram
    best = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram)).square()
    tolerance = 5e-5 if precision > 1e-10 else 1e-9
    largest = shape[0] * shape[1] // sum(shape)
    found = leading_directions(weight, gram, precision, largest=largest)
    assert (found.left.shape, found.right.shape) == ((shape[0], largest), (largest, shape[1]))
    assert found.left.dtype == found.right.dtype == torch.float64
    for k in (1, largest // 2, largest):
        optimum = float(best[k:].sum())
        assert output_error(weight, approximation(found, k), gram) == pytest.approx(optimum, rel=tolerance)
        rounding = precision * float(best.sum())  # of the largest, a massive token's, which sums are rounded by
        assert float(found.error[k]) == pytest.approx(optimum, rel=1e-9, abs=4 * rounding)


def test_no_more_ranks_than_asked_for_with_a_singular_metric():
    """A Gram of 20 tokens and 30 ranks: what is beyond the 20 is spent on the weights, on both sides of square."""
    for shape in ((60, 80), (80, 60)):
        weight, x = random(shape, 5), random((shape[1], 20), 6)
        part, whole = (leading_directions(weight, gram_of(x), largest=largest) for largest in (30, None))
        torch.testing.assert_close(approximation(part, 30), approximation(whole, 30), atol=1e-8, rtol=1e-8)
        assert part.left.shape[1] == 30
