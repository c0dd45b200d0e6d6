"""One suite for every registered structure and metric; below it, identities of particular ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from winnow.architectures import SITES, Matrix
from winnow.linalg import leading_directions
from winnow.metrics import METRICS, metric_of
from winnow.structures import STRUCTURES, structure_of
from winnow.structures.base import Problem

PAIRS = [(s, m) for s in STRUCTURES for m in METRICS]
ROLES = ("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj")


class World:
    """Two layers of random matrices whose inputs have channels of mixed scale."""

    def __init__(self, metric_kind, width, hidden, seed, tokens=200):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"q_proj": (width, width), "k_proj": (max(1, width // 2), width), "down_proj": (width, hidden)}
        shapes |= dict.fromkeys(("gate_proj", "up_proj"), (hidden, width))
        self.metric = metric_of({"kind": metric_kind})
        self.matrices, self.weights, self.inputs = [], {}, {}
        for layer in (0, 1):
            for role in ROLES:
                shape = shapes[role]
                matrix = Matrix(layer, role, f"layers.{layer}.{role}", SITES[role], shape, False, False)
                self.matrices.append(matrix)
                self.weights[matrix.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
                x = torch.randn(shape[1], tokens, generator=generator, dtype=torch.float64)
                scale = torch.logspace(-1, 1, shape[1], dtype=torch.float64)[:, None]
                self.inputs.setdefault((layer, matrix.site), scale * x)

    def problem(self, group, order=None) -> Problem:
        sites, weights = {}, {}
        for m in group:
            x = self.inputs[m.layer, m.site]
            x = x if order is None else x[order]
            gram = x @ x.T / x.shape[1]
            moments = {"gram": gram, "mean_abs": x.abs().mean(1), "max_abs": x.abs().amax(1), "rms": gram.diagonal().sqrt()}
            sites[m.name] = {need: moments[need] for need in self.metric.needs}
            weights[m.name] = self.weights[m.name] if order is None else self.weights[m.name][:, order]
        return Problem(group, weights, sites, self.metric)


def most(group) -> int:
    return min(sum(m.shape[0] for m in group), group[0].shape[1])


def rebuild(structure, group, tensors, size) -> tuple[dict[str, nn.Module], int]:
    """({matrix name: module with the stored tensors}, numbers stored), shared tensors in place."""
    stored = structure.stored(group, tensors, size)
    model, layouts = nn.Module(), {m.module: structure.layout(group, m, size) for m in group}
    for m in group:
        parent = model
        *path, last = m.module.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, structure.module(layouts[m.module], bias=False).double())
    tied = {key: owner for m in group for key, owner in structure.share(model, m.module, layouts[m.module]).items()}
    state = {f"{module}.{part}": tensor for module, parts in stored.items() for part, tensor in parts.items()}
    numbers = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    indices = sum(tensor.nbytes for tensor in state.values() if not tensor.is_floating_point())
    assert indices == structure.index_bytes(group), "bytes of indices by formula are those stored"
    model.load_state_dict({**state, **{key: state[owner] for key, owner in tied.items()}}, strict=True)
    return {m.name: model.get_submodule(m.module) for m in group}, numbers


def approximations(structure, group, fit, size):
    modules, _ = rebuild(structure, group, fit.tensors, size)
    with torch.no_grad():
        return {m.name: modules[m.name](torch.eye(m.shape[1], dtype=torch.float64)).T for m in group}


@pytest.mark.parametrize(("structure_kind", "metric_kind"), PAIRS)
@settings(max_examples=6, deadline=None)
@given(width=st.integers(3, 12), hidden=st.integers(3, 16), seed=st.integers(0, 10**6))
def test_identities(structure_kind, metric_kind, width, hidden, seed):
    structure, world = structure_of({"kind": structure_kind}), World(metric_kind, width, hidden, seed)
    for group in structure.groups(world.matrices):
        problem = world.problem(group)
        fit = structure.fit(problem, most(group))
        columns = problem.columns()
        root = torch.linalg.cholesky(columns) if columns.dim() == 2 else torch.diag(columns.sqrt())
        whole = float(sum(((world.weights[m.name] @ root).square().sum() for m in group), start=torch.tensor(0.0)))
        assert (fit.error.diff() <= 1e-9 * whole).all(), "the error must fall with the size"
        for size in range(1, min(most(group), len(fit.error) - 1) + 1):
            modules, numbers = rebuild(structure, group, fit.tensors, size)
            assert numbers == structure.numbers(group, size), "numbers by formula are numbers stored"
            error = 0.0
            for m in group:
                x = world.inputs[m.layer, m.site]
                with torch.no_grad():
                    approx = modules[m.name](torch.eye(m.shape[1], dtype=torch.float64)).T
                    torch.testing.assert_close(modules[m.name](x.T), (approx @ x).T, atol=1e-8, rtol=1e-8)
                error += float(((world.weights[m.name] - approx) @ root).square().sum())
            assert error == pytest.approx(float(fit.error[size]), rel=1e-7, abs=1e-9 * whole)
        for name, approx in approximations(structure, group, fit, most(group)).items():
            torch.testing.assert_close(approx, world.weights[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("structure_kind", "metric_kind"), PAIRS)
def test_groups_hold_every_matrix_once_and_same_input_gives_same_bytes(structure_kind, metric_kind):
    structure, world = structure_of({"kind": structure_kind}), World(metric_kind, 8, 12, 3)
    groups = structure.groups(world.matrices)
    assert sorted(m.name for group in groups for m in group) == sorted(m.name for m in world.matrices)
    for group in groups:
        fits = [structure.fit(world.problem(group), most(group)) for _ in range(2)]
        for name, tensor in fits[0].tensors.items():
            assert torch.equal(tensor, fits[1].tensors[name])


@pytest.mark.parametrize(("structure_kind", "metric_kind"), PAIRS)
def test_permuted_inputs_give_the_permuted_answer(structure_kind, metric_kind):
    structure, world = structure_of({"kind": structure_kind}), World(metric_kind, 9, 14, 4)
    for group in structure.groups(world.matrices):
        order = torch.randperm(group[0].shape[1], generator=torch.Generator().manual_seed(1))
        plain = approximations(structure, group, structure.fit(world.problem(group), 4), 4)
        other = approximations(structure, group, structure.fit(world.problem(group, order), 4), 4)
        for name, approx in plain.items():
            torch.testing.assert_close(other[name], approx[:, order], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("structure_kind", STRUCTURES)
@pytest.mark.parametrize(("width", "hidden"), [(8, 8), (32, 48), (6, 300)])
def test_largest_is_the_break_even_size(structure_kind, width, hidden):
    structure, world = structure_of({"kind": structure_kind}), World("weights", width, hidden, 5)
    for group in structure.groups(world.matrices):
        largest, dense = structure.largest(group), sum(m.shape[0] * m.shape[1] for m in group)
        assert largest == 0 or structure.numbers(group, largest) < dense
        assert structure.numbers(group, largest + 1) >= dense


def test_registry_describes_every_entry():
    for cls in (*STRUCTURES.values(), *METRICS.values()):
        assert cls.__doc__
        assert cls.reference
        assert cls.version >= 1
        assert cls.kind()


@pytest.mark.parametrize("metric_kind", METRICS)
def test_basis_sharing_of_one_layer_is_low_rank(metric_kind):
    """T11: a group of one layer shares with nobody."""
    world = World(metric_kind, 10, 14, 6)
    alone, low_rank = structure_of({"kind": "basis_sharing", "layers": 1}), structure_of({"kind": "low_rank"})
    for one, other in zip(alone.groups(world.matrices), low_rank.groups(world.matrices), strict=True):
        assert one == other
        a, b = (s.fit(world.problem(one), 5) for s in (alone, low_rank))
        torch.testing.assert_close(a.error, b.error)
        for name, approx in approximations(alone, one, a, 4).items():
            torch.testing.assert_close(approx, approximations(low_rank, one, b, 4)[name])


def test_shared_basis_is_the_svd_of_the_stacked_matrix_and_its_power_is_a_no_op():
    """T7, and GRC: the basis is spanned by the leading eigenvectors of K = sum W^T W, and of any power of K."""
    world, structure = World("weights", 12, 20, 7), structure_of({"kind": "shared_basis"})
    group = next(g for g in structure.groups(world.matrices) if g[0].role == "gate_proj")
    assert [m.role for m in group] == ["gate_proj", "up_proj"]
    stacked = torch.cat([world.weights[m.name] for m in group])
    u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
    fit = structure.fit(world.problem(group), 12)
    for k in (1, 4, 9):
        found = torch.cat(list(approximations(structure, group, fit, k).values()))
        torch.testing.assert_close(found, (u[:, :k] * s[:k]) @ vh[:k])
        for power in (1, 4):
            basis = torch.linalg.eigh(torch.linalg.matrix_power(stacked.T @ stacked, power)).eigenvectors.flip(1)[:, :k]
            torch.testing.assert_close(stacked @ basis @ basis.T, found, atol=1e-7, rtol=1e-6)


def test_principal_components_of_the_inputs_lose_at_least_the_optimum():
    world = World("gram", 10, 16, 8)
    best, pca = structure_of({"kind": "shared_basis"}), structure_of({"kind": "shared_basis", "basis": "inputs"})
    for group in pca.groups(world.matrices):
        problem = world.problem(group)
        one, other = best.fit(problem, most(group)), pca.fit(problem, most(group))
        assert (other.error >= one.error - 1e-9 * one.error[0]).all()
        stacked = torch.cat([world.weights[m.name] for m in group])
        for k in (1, 5):
            rest = stacked - torch.cat(list(approximations(pca, group, other, k).values()))
            assert float(torch.trace(rest @ problem.columns() @ rest.T)) == pytest.approx(float(other.error[k]), rel=1e-9)
    with pytest.raises(ValueError, match="need the metric `gram`"):
        pca.fit(World("weights", 10, 16, 8).problem(group), 3)


def test_sharing_helps_where_layers_agree_and_costs_where_they_do_not():
    """Basis Sharing's own measurement has both signs; the objective must have them too."""
    world = World("weights", 12, 18, 9)
    sharing = structure_of({"kind": "basis_sharing", "layers": 2})
    group = next(g for g in sharing.groups(world.matrices) if g[0].role == "up_proj" and len(g) == 2)
    same = Problem(group, dict.fromkeys(world.weights, world.weights[group[0].name]), {}, world.metric)
    alone = leading_directions(world.weights[group[0].name], torch.ones(12, dtype=torch.float64))[2]
    torch.testing.assert_close(sharing.fit(same, 12).error[:13], 2 * alone)


@pytest.mark.parametrize("metric_kind", METRICS)
def test_bypass_in_one_metric_is_a_larger_rank(metric_kind):
    """T6: top r directions kept, then rank k of what is left, is rank r + k."""
    world, low_rank = World(metric_kind, 14, 20, 10), structure_of({"kind": "low_rank"})
    bypass = structure_of({"kind": "bypass", "kept": 3})
    for group in bypass.groups(world.matrices):
        if min(group[0].shape) < 10:
            continue
        a, b = (s.fit(world.problem(group), most(group)) for s in (bypass, low_rank))
        for k in (1, 4):
            for name, approx in approximations(bypass, group, a, k).items():
                torch.testing.assert_close(approx, approximations(low_rank, group, b, k + 3)[name], atol=1e-8, rtol=1e-8)
            assert float(a.error[k]) == pytest.approx(float(b.error[k + 3]), rel=1e-8)
            assert bypass.numbers(group, k) == low_rank.numbers(group, k + 3)


def test_bypass_around_another_structure_and_metric():
    """Kept directions in the weights, a shared basis in the Gram metric for the rest: every part is stored and summed."""
    world = World("weights", 12, 18, 11)
    remainder = {"remainder": {"kind": "shared_basis"}, "remainder_metric": {"kind": "gram"}}
    bypass = structure_of({"kind": "bypass", "kept": 2, **remainder})
    assert bypass.needs() == ("gram",)
    gram_world = World("gram", 12, 18, 11)
    for group in bypass.groups(world.matrices):
        problem = Problem(group, world.weights, gram_world.problem(group).sites, world.metric)
        fit = bypass.fit(problem, most(group))
        _, numbers = rebuild(bypass, group, fit.tensors, 3)
        assert numbers == bypass.numbers(group, 3)
        for name, approx in approximations(bypass, group, fit, most(group)).items():
            torch.testing.assert_close(approx, world.weights[name], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("metric_kind", METRICS)
def test_gauge_fixed_is_low_rank_in_fewer_numbers(metric_kind):
    world = World(metric_kind, 12, 18, 12)
    fixed, plain = structure_of({"kind": "gauge_fixed"}), structure_of({"kind": "low_rank"})
    for group in fixed.groups(world.matrices):
        a, b = (s.fit(world.problem(group), most(group)) for s in (fixed, plain))
        for k in (1, 3, most(group) - 1):
            assert plain.numbers(group, k) - fixed.numbers(group, k) == k * k
            for name, approx in approximations(fixed, group, a, k).items():
                torch.testing.assert_close(approx, approximations(plain, group, b, k)[name], atol=1e-9, rtol=1e-9)
