"""One suite for every registered structure and metric: nothing here names a particular one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.architectures import Matrix
from winnow.metrics import METRICS, metric_of
from winnow.structures import STRUCTURES, structure_of
from winnow.structures.base import Problem

PAIRS = [(s, m) for s in STRUCTURES for m in METRICS]


def problem(metric_kind, shape, seed, tokens=200):
    """A group of one matrix with inputs of mixed scale, and its metric's statistics."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(shape[1], tokens, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, shape[1], dtype=torch.float64)[:, None]
    site = {"gram": x @ x.T / tokens, "mean_abs": x.abs().mean(1)}
    matrix = Matrix(0, "up_proj", "layer.up_proj", "ffn_input", shape, False, False)
    return matrix, Problem({"up_proj": weight}, {"ffn_input": site}, metric_of({"kind": metric_kind})), x


def rebuild(structure, matrix, tensors, size, dtype=torch.float64):
    """The stored form as a module."""
    (stored,) = structure.stored([matrix], tensors, size).values()
    module = structure.module(structure.layout(matrix, size), bias=False).to(dtype)
    module.load_state_dict({name: t.to(dtype) for name, t in stored.items()}, strict=True)
    return module, stored


@pytest.mark.parametrize(("structure_kind", "metric_kind"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(shape=st.tuples(st.integers(3, 20), st.integers(3, 20)), seed=st.integers(0, 10**6))
def test_identities(structure_kind, metric_kind, shape, seed):
    structure = structure_of({"kind": structure_kind})
    matrix, given_problem, x = problem(metric_kind, shape, seed)
    weight = given_problem.weights["up_proj"]
    fit = structure.fit(given_problem, min(shape))
    columns = given_problem.metric.columns(weight, given_problem.sites["ffn_input"])
    root = torch.linalg.cholesky(columns) if columns.dim() == 2 else torch.diag(columns.sqrt())
    assert (fit.error.diff() <= 1e-9 * fit.error[0]).all(), "the error must fall with the size"
    eye = torch.eye(shape[1], dtype=torch.float64)
    for size in range(1, min(shape) + 1):
        module, stored = rebuild(structure, matrix, fit.tensors, size)
        numbers = sum(t.numel() for t in stored.values())
        assert numbers == structure.numbers([matrix], size), "bytes by formula are bytes stored"
        with torch.no_grad():
            approx = module(eye).T
            torch.testing.assert_close(module(x.T), (approx @ x).T, atol=1e-9, rtol=1e-9)
        error = float(((weight - approx) @ root).square().sum())
        assert error == pytest.approx(float(fit.error[size]), rel=1e-7, abs=1e-9 * float(fit.error[0]))
    torch.testing.assert_close(approx, weight, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("structure_kind", "metric_kind"), PAIRS)
def test_same_input_same_bytes(structure_kind, metric_kind):
    structure = structure_of({"kind": structure_kind})
    fits = [structure.fit(problem(metric_kind, (12, 17), 3)[1], 12) for _ in range(2)]
    for name, tensor in fits[0].tensors.items():
        assert torch.equal(tensor, fits[1].tensors[name])


@pytest.mark.parametrize(("structure_kind", "metric_kind"), PAIRS)
def test_permuted_inputs_give_the_permuted_answer(structure_kind, metric_kind):
    structure = structure_of({"kind": structure_kind})
    matrix, original, _ = problem(metric_kind, (9, 14), 4)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    site = original.sites["ffn_input"]
    permuted = Problem(
        {"up_proj": original.weights["up_proj"][:, order]},
        {"ffn_input": {"gram": site["gram"][order][:, order], "mean_abs": site["mean_abs"][order]}},
        original.metric,
    )
    with torch.no_grad():
        eye = torch.eye(14, dtype=torch.float64)
        plain = rebuild(structure, matrix, structure.fit(original, 5).tensors, 5)[0](eye).T
        other = rebuild(structure, matrix, structure.fit(permuted, 5).tensors, 5)[0](eye).T
    torch.testing.assert_close(other, plain[:, order], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("structure_kind", STRUCTURES)
@pytest.mark.parametrize("shape", [(8, 8), (48, 32), (5, 300)])
def test_largest_is_the_break_even_size(structure_kind, shape):
    structure = structure_of({"kind": structure_kind})
    group = [Matrix(0, "up_proj", "m", "ffn_input", shape, False, False)]
    largest, dense = structure.largest(group), shape[0] * shape[1]
    assert structure.numbers(group, largest) < dense <= structure.numbers(group, largest + 1)


def test_registry_describes_every_entry():
    for cls in (*STRUCTURES.values(), *METRICS.values()):
        assert cls.__doc__
        assert cls.reference
        assert cls.version >= 1
        assert cls.kind()
