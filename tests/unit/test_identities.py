"""Exact identities of particular structures (T6, T7, T11 and others of the methods' reference)."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.unit.worlds import World, matrix_of, small
from winnow.metrics.base import METRICS
from winnow.numerics.linalg import leading_directions
from winnow.numerics.neurons import order_of
from winnow.structures.base import STRUCTURES, Problem


def most(group) -> int:
    return min(sum(m.shape[0] for m in group), group[0].shape[1])


def approximations(world, structure, group, fit, size):
    model, _ = world.compressed(structure, group, fit.tensors, size)
    return {m.name: matrix_of(model.get_submodule(m.module), m.shape[1]) for m in group}


@pytest.mark.parametrize("metric_kind", METRICS)
def test_basis_sharing_of_one_layer_is_low_rank(metric_kind):
    """T11: a group of one layer shares with nobody."""
    world = World(metric_kind, 10, 14, 6)
    alone, low_rank = STRUCTURES.build({"kind": "basis_sharing", "layers": 1}), STRUCTURES.build({"kind": "low_rank"})
    for one, other in zip(alone.groups(world.matrices), low_rank.groups(world.matrices), strict=True):
        assert one == other
        a, b = (s.fit(world.problem(s, one), 5) for s in (alone, low_rank))
        torch.testing.assert_close(a.error, b.error)
        for name, approx in approximations(world, alone, one, a, 4).items():
            torch.testing.assert_close(approx, approximations(world, low_rank, one, b, 4)[name])


def test_shared_basis_is_the_svd_of_the_stacked_matrix_and_its_power_is_a_no_op():
    """T7, and GRC: the basis is spanned by the leading eigenvectors of K = sum W^T W, and of any power of K."""
    world, structure = World("weights", 12, 20, 7), STRUCTURES.build({"kind": "shared_basis"})
    group = next(g for g in structure.groups(world.matrices) if g[0].role == "gate_proj")
    assert [m.role for m in group] == ["gate_proj", "up_proj"]
    stacked = torch.cat([world.weights[m.name] for m in group])
    u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
    fit = structure.fit(world.problem(structure, group), 12)
    for k in (1, 4, 9):
        found = torch.cat(list(approximations(world, structure, group, fit, k).values()))
        torch.testing.assert_close(found, (u[:, :k] * s[:k]) @ vh[:k])
        for power in (1, 4):
            basis = torch.linalg.eigh(torch.linalg.matrix_power(stacked.T @ stacked, power)).eigenvectors.flip(1)[:, :k]
            torch.testing.assert_close(stacked @ basis @ basis.T, found, atol=1e-7, rtol=1e-6)


def test_principal_components_of_the_inputs_lose_at_least_the_optimum():
    world = World("gram", 10, 16, 8)
    best, pca = STRUCTURES.build({"kind": "shared_basis"}), STRUCTURES.build({"kind": "shared_basis", "basis": "inputs"})
    for group in pca.groups(world.matrices):
        problem = world.problem(pca, group)
        one, other = best.fit(problem, most(group)), pca.fit(problem, most(group))
        assert (other.error >= one.error - 1e-9 * one.error[0]).all()
        stacked = torch.cat([world.weights[m.name] for m in group])
        for k in (1, 5):
            rest = stacked - torch.cat(list(approximations(world, pca, group, other, k).values()))
            assert float(torch.trace(rest @ problem.columns() @ rest.T)) == pytest.approx(float(other.error[k]), rel=1e-9)
    with pytest.raises(ValueError, match="need the metric `gram`"):
        pca.fit(World("weights", 10, 16, 8).problem(pca, group), 3)


def test_sharing_helps_where_layers_agree_and_costs_where_they_do_not():
    """Basis Sharing's own measurement has both signs; the objective must have them too."""
    world = World("weights", 12, 18, 9)
    sharing = STRUCTURES.build({"kind": "basis_sharing", "layers": 2})
    group = next(g for g in sharing.groups(world.matrices) if g[0].role == "up_proj" and len(g) == 2)
    same = Problem(group, dict.fromkeys(world.weights, world.weights[group[0].name]), {}, world.metric)
    alone = leading_directions(world.weights[group[0].name], torch.ones(12, dtype=torch.float64)).error
    torch.testing.assert_close(sharing.fit(same, 12).error[:13], 2 * alone)


@pytest.mark.parametrize("metric_kind", METRICS)
def test_bypass_in_one_metric_is_a_larger_rank(metric_kind):
    """T6: top r directions kept, then rank k of what is left, is rank r + k."""
    world, low_rank = World(metric_kind, 14, 20, 10), STRUCTURES.build({"kind": "low_rank"})
    bypass = STRUCTURES.build({"kind": "bypass", "kept": 3})
    for group in bypass.groups(world.matrices):
        if min(group[0].shape) < 10:
            continue
        a, b = (s.fit(world.problem(s, group), most(group)) for s in (bypass, low_rank))
        for k in (1, 4):
            for name, approx in approximations(world, bypass, group, a, k).items():
                torch.testing.assert_close(approx, approximations(world, low_rank, group, b, k + 3)[name], atol=1e-8, rtol=1e-8)
            assert float(a.error[k]) == pytest.approx(float(b.error[k + 3]), rel=1e-8)
            assert bypass.numbers(group, k, {}) == low_rank.numbers(group, k + 3, {})


def test_bypass_around_another_structure_and_metric():
    """Kept directions in the weights, a shared basis in the Gram metric for the rest: every part is stored and summed."""
    world = World("weights", 12, 18, 11)
    remainder = {"remainder": {"kind": "shared_basis"}, "remainder_metric": {"kind": "gram"}}
    bypass = STRUCTURES.build({"kind": "bypass", "kept": 2, **remainder})
    assert bypass.needs() == ("gram",)
    gram_world = World("gram", 12, 18, 11)
    for group in bypass.groups(world.matrices):
        problem = replace(world.problem(bypass, group), sites=gram_world.problem(bypass, group).sites)
        fit = bypass.fit(problem, most(group))
        _, numbers = world.compressed(bypass, group, fit.tensors, 3)
        assert numbers == bypass.numbers(group, 3, {})
        for name, approx in approximations(world, bypass, group, fit, most(group)).items():
            torch.testing.assert_close(approx, world.weights[name], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("metric_kind", METRICS)
def test_gauge_fixed_is_low_rank_in_fewer_numbers(metric_kind):
    world = World(metric_kind, 12, 18, 12)
    fixed, plain = STRUCTURES.build({"kind": "gauge_fixed"}), STRUCTURES.build({"kind": "low_rank"})
    for group in fixed.groups(world.matrices):
        a, b = (s.fit(world.problem(s, group), most(group)) for s in (fixed, plain))
        for k in (1, 3, most(group) - 1):
            assert plain.numbers(group, k, {}) - fixed.numbers(group, k, {}) == k * k
            for name, approx in approximations(world, fixed, group, a, k).items():
                torch.testing.assert_close(approx, approximations(world, plain, group, b, k)[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("metric_kind", METRICS)
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_one_cluster_is_low_rank(metric_kind, axis):
    """T11: clusters of one."""
    world, low_rank = World(metric_kind, 9, 14, 13), STRUCTURES.build({"kind": "low_rank"})
    alone = STRUCTURES.build({"kind": "cluster", "clusters": 1, "axis": axis})
    for group in alone.groups(world.matrices):
        a, b = (s.fit(world.problem(s, group), most(group)) for s in (alone, low_rank))
        for size in (1, 3):
            if alone.blocks(group[0], [alone.limit(group)], size)[0][2] == size:
                one = approximations(world, alone, group, a, size)[group[0].name]
                other = approximations(world, low_rank, group, b, size)[group[0].name]
                torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("by", ["norm", "cosine", "random", "activation"])
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_clusters_never_beat_one_svd_of_the_same_total_rank(by, axis):
    """F1: the blocks side by side are one map whose rank is at most the sum of theirs."""
    world = World("weights", 12, 20, 14)
    clusters = STRUCTURES.build({"kind": "cluster", "clusters": 3, "axis": axis, "by": by})
    for group in clusters.groups(world.matrices):
        fit = clusters.fit(world.problem(clusters, group), clusters.limit(group))
        best = leading_directions(world.weights[group[0].name], torch.ones(group[0].shape[1], dtype=torch.float64)).error
        for size in range(1, clusters.limit(group) + 1):
            blocks = clusters.blocks(group[0], fit.tensors["sizes"].tolist(), size)
            total = sum(min(m, n) if rank is None else rank for m, n, rank in blocks)
            assert float(fit.error[size]) >= float(best[min(total, len(best) - 1)]) - 1e-9


def test_clusters_by_activation_are_those_of_the_neurons():
    """Rows of gate and up and columns of down are the same neurons, so clusters by their activation are the same."""
    world = World("weights", 8, 24, 15)
    for by in ("activation", "co_activation"):
        structure = STRUCTURES.build({"kind": "cluster", "clusters": 3, "axis": "neurons", "by": by})
        groups = [g for g in structure.groups(world.matrices) if g[0].layer == 0]
        assert {g[0].role for g in groups} == {"gate_proj", "up_proj", "down_proj", "o_proj"}
        labels = {g[0].role: world.problem(structure, g).labels[g[0].name] for g in groups}
        assert torch.equal(labels["gate_proj"], labels["down_proj"])
        assert torch.equal(labels["up_proj"], labels["down_proj"])


def test_published_tiers_store_what_the_paper_script_does():
    """down_proj of SmolLM2 at k_frac 0.5: 32 exact, 225 exact, 526 of rank 220, 753 of rank 148: 587,164 numbers."""
    tiers = STRUCTURES.build({"kind": "tiers"})
    matrix = replace(World("weights", 4, 6, 0).matrices[-1], shape=(576, 1536))
    sizes = [32, 225, 526, 753]
    assert tiers.ranks(sizes, 768) == [32, 368, 220, 147]  # int(736 * 0.2) = 147, where the reference rounds to 148
    assert tiers.numbers([matrix], 768, {"sizes": torch.tensor(sizes)}) == 576 * (32 + 225) + 220 * (576 + 526) + 147 * (
        576 + 753
    )


@pytest.mark.parametrize("metric_kind", METRICS)
def test_split_at_its_corners_is_low_rank_and_dense(metric_kind):
    """T11: no heavy neuron gives low rank in every matrix, heavy neurons alone give the FFN itself."""
    world, low_rank = World(metric_kind, 9, 14, 16), STRUCTURES.build({"kind": "low_rank"})
    light, heavy = (STRUCTURES.build({"kind": "split", "exact": share, "criterion": "activation"}) for share in (0, 1))
    for group in light.groups(world.matrices):
        fit = light.fit(world.problem(light, group), 5)
        parts = [low_rank.fit(world.problem(low_rank, [m]), 5) for m in group]
        torch.testing.assert_close(fit.error, sum(p.error for p in parts), rtol=1e-9, atol=1e-9)
        layer = group[0].layer
        whole, _ = world.compressed(heavy, group, heavy.fit(world.problem(heavy, group), 1).tensors, 1)
        torch.testing.assert_close(world.ffn(whole, layer), world.ffn(world.dense(), layer))


def test_neurons_contribute_what_they_are_scored_by():
    """Without neuron j the output changes by exactly h_j W_down[:, j]; the contributions add up to the output without bias;
    and the score `activation_x_row` is the root mean square of a contribution."""
    world = World(None, 7, 11, 17)
    group = STRUCTURES.build({"kind": "split"}).groups(world.matrices)[0]
    down = world.weights["000.down_proj"]
    hidden = world.inputs[0, "ffn_hidden"]
    dense, total = world.ffn(world.dense(), 0), torch.zeros(200, 7, dtype=torch.float64)
    sizes = []
    for j in range(11):
        model = world.dense()
        model.layers[0].down_proj.weight.data[:, j] = 0
        contribution = torch.outer(hidden[j], down[:, j])
        torch.testing.assert_close(dense - world.ffn(model, 0), contribution)
        total += contribution
        sizes.append(contribution.square().sum(1).mean().sqrt())
    torch.testing.assert_close(total, dense - world.biases["000.down_proj"])
    problem = world.problem(STRUCTURES.build({"kind": "split", "criterion": "activation_x_row"}), group)
    assert torch.equal(order_of(problem, "activation_x_row", 0), torch.stack(sizes).argsort(descending=True))


@pytest.mark.parametrize("criterion", ["activation", "activation_x_row", "weight_norm", "leverage", "lowest"])
def test_scores_do_not_depend_on_the_order_of_tokens(criterion):
    structure = STRUCTURES.build({"kind": "split", "criterion": criterion})
    world = World("weights", 8, 12, 18)
    group = structure.groups(world.matrices)[0]
    plain = order_of(world.problem(structure, group), criterion, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    world.inputs = {key: x[:, order] for key, x in world.inputs.items()}
    assert torch.equal(order_of(world.problem(structure, group), criterion, 0), plain)


@pytest.mark.parametrize("criterion", ["output", "loss"])
def test_neurons_are_taken_by_what_each_gains(criterion):
    """Every next one is the best of all that are left, by least squares on the tokens; what is no news comes last."""
    world = World(None, 5, 9, 23)
    world.inputs[0, "ffn_hidden"][4] = 2 * world.inputs[0, "ffn_hidden"][1] - world.inputs[0, "ffn_hidden"][7]
    structure = STRUCTURES.build({"kind": "neuron_slice", "criterion": criterion})
    group = structure.groups(world.matrices)[0]
    problem, down = world.problem(structure, group), group[-1]
    order = order_of(problem, criterion, 0).tolist()
    assert sorted(order) == list(range(9))
    assert order[-1] in (1, 4, 7)
    hidden = world.inputs[0, "ffn_hidden"].T
    target, rows = hidden @ world.weights[down.name].T, problem.outputs[down.name]["gradient_gram"]
    rows = rows if criterion == "loss" else torch.eye(5, dtype=torch.float64)

    def lost(kept):
        rest = target - hidden[:, kept] @ torch.linalg.lstsq(hidden[:, kept], target).solution
        return float(((rest @ rows) * rest).sum())

    for count in range(8):
        after = {j: lost([*order[:count], j]) for j in order[count:]}
        assert after[order[count]] <= min(after.values()) + 1e-9 * lost(order[:1])


def test_affine_maps_are_least_squares():
    """Of the whole FFN and of its light neurons: the residual is orthogonal to [x, 1], lstsq finds the same, and the error
    of rank d is that of the full map."""
    world = World(None, 6, 10, 19, tokens=300)
    x = world.inputs[0, "ffn_input"].T
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    block = STRUCTURES.build({"kind": "affine_block", "ridge": 1e-14})
    group = block.groups(world.matrices)[0]
    fit = block.fit(world.problem(block, group), block.limit(group))
    model, _ = world.compressed(block, group, fit.tensors, block.limit(group))
    target = world.ffn(world.dense(), 0)
    best = design @ torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(world.ffn(model, 0), best, atol=1e-7, rtol=1e-7)
    assert float((design.T @ (target - world.ffn(model, 0))).abs().max()) < 1e-6 * float(design.abs().sum())
    for size in (1, 2):
        reduced, _ = world.compressed(block, group, fit.tensors, size)
        prediction = world.ffn(reduced, 0)
        centred = best - best.mean(0)
        _, _, vh = torch.linalg.svd(centred, full_matrices=False)
        torch.testing.assert_close(prediction - best.mean(0), centred @ vh[:size].T @ vh[:size], atol=1e-6, rtol=1e-6)
    split = STRUCTURES.build({"kind": "split_affine", "ridge": 1e-14})
    fit = split.fit(world.problem(split, group), 10)
    order = fit.tensors["order"] if "order" in fit.tensors else order_of(world.problem(split, group), "activation_x_row", 0)
    light = order[4:]
    rest = world.inputs[0, "ffn_hidden"][light].T @ world.weights["000.down_proj"][:, light].T
    model, _ = world.compressed(split, group, fit.tensors, 4)
    expected = target - rest + design @ torch.linalg.lstsq(design, rest).solution
    torch.testing.assert_close(world.ffn(model, 0), expected, atol=1e-6, rtol=1e-6)


def test_a_linear_ffn_is_replaced_exactly(monkeypatch):
    """R2_lin = 1 if the activation is linear and gate does not depend on the input."""
    monkeypatch.setattr(nn, "SiLU", nn.Identity)
    monkeypatch.setattr(nn.functional, "silu", lambda x: x)
    world = World(None, 6, 10, 20)
    world.weights = {name: w * (0 if "gate" in name else 1) for name, w in world.weights.items()}
    for layer in (0, 1):
        x, block = world.inputs[layer, "ffn_input"].T, world.dense().layers[layer]
        with torch.no_grad():
            world.inputs[layer, "ffn_hidden"] = (block.gate_proj(x) * block.up_proj(x)).T
    structure = STRUCTURES.build({"kind": "affine_block"})
    for group in structure.groups(world.matrices):
        fit = structure.fit(world.problem(structure, group), structure.limit(group))
        model, _ = world.compressed(structure, group, fit.tensors, structure.limit(group))
        torch.testing.assert_close(
            world.ffn(model, group[0].layer), world.ffn(world.dense(), group[0].layer), atol=1e-5, rtol=1e-5
        )


def test_sliced_neurons_are_corrected_by_least_squares():
    world = World(None, 7, 12, 21)
    structure = STRUCTURES.build({"kind": "neuron_slice"})
    for group in structure.groups(world.matrices):
        layer, down = group[0].layer, world.weights[group[-1].name]
        problem = world.problem(structure, group)
        fit, order = structure.fit(problem, 12), order_of(problem, "leverage", 0)
        hidden = world.inputs[layer, "ffn_hidden"].T
        for size in (1, 5, 11):
            kept = hidden[:, order[:size]]
            best = kept @ torch.linalg.lstsq(kept, hidden @ down.T).solution + world.biases[group[-1].name]
            model, _ = world.compressed(structure, group, fit.tensors, size)
            torch.testing.assert_close(world.ffn(model, layer), best, atol=1e-6, rtol=1e-6)


def test_by_target_is_each_structure_on_its_own_matrices():
    world = World("gram", 10, 16, 5)
    parts = {"attention": {"kind": "shared_basis"}, "ffn": {"kind": "gauge_fixed"}}
    structure = STRUCTURES.build({"kind": "by_target", "parts": parts})
    groups = structure.groups(world.matrices)
    assert {m.name for group in groups for m in group} == {m.name for m in world.matrices}
    for group in groups:
        own = STRUCTURES.build(parts["ffn" if group[0].role in ("gate_proj", "up_proj", "down_proj") else "attention"])
        assert own.groups(group) == [group]
        models = [world.compressed(s, group, s.fit(world.problem(s, group), 4).tensors, 4) for s in (structure, own)]
        assert models[0][1] == models[1][1]
        for m in group:
            one, other = (matrix_of(model.get_submodule(m.module), m.shape[1]) for model, _ in models)
            assert torch.equal(one, other)
    clusters = {"qkv": {"kind": "low_rank"}, "ffn": {"kind": "cluster", "clusters": 2}}
    control = STRUCTURES.build({"kind": "by_target", "parts": clusters}).control()
    assert [part["kind"] for part in control.model_dump()["parts"].values()] == ["low_rank", "cluster"]
    assert control.model_dump()["parts"]["ffn"]["by"] == "random"
    assert STRUCTURES.build(control.model_dump()).control() is None


def test_random_controls_differ_in_the_selection_only():
    for kind in ("cluster", "tiers", "split", "split_affine", "neuron_slice"):
        structure = STRUCTURES.build(small(kind))
        control = structure.control()
        assert control is not None
        changed = {k for k, v in control.model_dump().items() if v != structure.options.model_dump()[k]}
        assert len(changed) == 1
        assert "random" in {control.model_dump()[k] for k in changed}
        assert STRUCTURES.build(control.model_dump()).control() is None


def test_own_metric_optimality_both_ways():
    """T9: each metric's fit wins in its own error and loses, or ties, in every other one's."""
    worlds = {kind: World(kind, 10, 16, 22) for kind in METRICS}
    low_rank = STRUCTURES.build({"kind": "low_rank"})
    for group in low_rank.groups(worlds["weights"].matrices):
        problems = {kind: worlds[kind].problem(low_rank, group) for kind in METRICS}
        found = {kind: approximations(worlds[kind], low_rank, group, low_rank.fit(p, 3), 3) for kind, p in problems.items()}
        weight = worlds["weights"].weights[group[0].name]
        for kind, problem in problems.items():
            columns, rows = problem.columns(), problem.rows()
            root = torch.diag(columns.sqrt()) if columns.dim() == 1 else torch.linalg.cholesky(columns)
            side = torch.eye(len(weight), dtype=torch.float64) if rows is None else rows
            side = torch.diag(side) if side.dim() == 1 else side
            losses = {}
            for other, approx in found.items():
                rest = (weight - approx[group[0].name]) @ root
                losses[other] = float(((side @ rest) * rest).sum())
            assert losses[kind] <= min(losses.values()) * (1 + 1e-9)


def test_a_constant_factor_of_a_metric_changes_nothing():
    """T4: C = c I gives plain SVD, and so does R = c I; a factor of either is no change."""
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain = leading_directions(weight, torch.ones(9, dtype=torch.float64))
    for columns, rows in (
        (torch.eye(9), None),
        (torch.full((9,), 5.0), torch.full((7,), 3.0)),
        (7 * torch.eye(9), 2 * torch.eye(7)),
    ):
        found = leading_directions(weight, columns.double(), rows=None if rows is None else rows.double())
        for k in (1, 4):
            expected = plain.left[:, :k] @ plain.right[:k]
            torch.testing.assert_close(found.left[:, :k] @ found.right[:k], expected)


def test_ridge_moves_a_metric_towards_the_weights():
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gram = x @ x.T
    plain, ridged = (METRICS.build({"kind": "gram", "ridge": r}).columns(torch.ones(3, 6), {"gram": gram}) for r in (0.0, 0.5))
    torch.testing.assert_close(ridged - plain, 0.5 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64))
