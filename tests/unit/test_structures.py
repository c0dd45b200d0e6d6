"""One suite for every registered structure and metric; below it, identities of particular ones."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.worlds import FITTED, LOSSY, VARIANTS, World, matrix_of, small
from winnow.factors.fit import storable
from winnow.metrics.base import METRICS
from winnow.models.architectures import GRADIENTS
from winnow.planning.config_files import default
from winnow.structures import rounded
from winnow.structures.base import STRUCTURES, Problem

ROUNDED_PARTS = [
    {"kind": "rounded_low_rank", "ranks": [0.5, 0.75], "bits": [3, 4], "group": 16},
    {"kind": "rounded_neuron_slice", "criterion": "loss", "neurons": [0.5, 1.0], "bits": [3, 4], "group": 16},
]
ALONE = {"rounded", "rounded_low_rank", "rounded_neuron_slice"}  # whose sizes are fitted one by one
SPECS = [*(small(kind) for kind in FITTED), *VARIANTS]


def metrics_of(spec) -> list:
    """Every metric that a structure can use for a registered structure, the widest ones for a variant."""
    structure = STRUCTURES[spec["kind"]]
    if structure.objective != "metric":
        return [None]
    few = spec in VARIANTS or spec["kind"] in ("by_target", "rounded_low_rank")  # whose parts see all of them
    kinds = ["gram", "two_sided"] if few else list(METRICS)
    return [kind for kind in kinds if structure.weighs_outputs or not set(METRICS[kind].needs) & set(GRADIENTS)]


PAIRS = [(spec, metric) for spec in SPECS for metric in metrics_of(spec)]


def named(value) -> str | None:
    """What a specification is called in test names."""
    if not isinstance(value, dict):
        return value
    return "-".join(str(v["kind"] if isinstance(v, dict) else v) for v in value.values())


def own_error(structure, world, problem, tensors, model) -> float:
    """The error that `Fit.error` claims to be, from the modules themselves."""
    group = problem.group
    if structure.objective == "ffn_output":
        layer = group[0].layer
        if structure.kind() == "rounded_neuron_slice":  # which claims the error of hidden units that are not rounded
            for m in group[:-1]:
                kept = tensors["order"][: model.get_submodule(m.module).out_features]
                exact = nn.Linear(m.shape[1], len(kept), m.bias, dtype=torch.float64)
                exact.load_state_dict(
                    {"weight": world.weights[m.name][kept], **({"bias": world.biases[m.name][kept]} if m.bias else {})}
                )
                setattr(model.layers[layer], m.role, exact)
        return float((world.ffn(model, layer) - world.ffn(world.dense([layer]), layer)).square().sum(1).mean())
    error, order = 0.0, tensors["order"].long() if structure.bias_name is None else None
    for m in group:
        weight, rows = world.weights[m.name], problem.rows([m])
        if order is None:
            own = structure.optimised_at_size  # then every layer's inputs have their own metric
            columns = problem.columns([m]) if own else structure.metric_of_error(problem)[0]
            rows = rows if len(group) > 1 else structure.metric_of_error(problem)[1]
        elif m.role == "down_proj":  # the neurons are reordered, and the metric of their side with them
            weight, columns = weight[:, order], restricted(problem.columns([m]), order)
        else:
            weight, columns, rows = weight[order], problem.columns([m]), restricted(rows, order)
        rest = weight - matrix_of(model.get_submodule(m.module), m.shape[1])
        weighted = rest if rows is None else (rows[:, None] * rest if rows.dim() == 1 else rows @ rest)
        error += float(((rest * columns if columns.dim() == 1 else rest @ columns) * weighted).sum())
    return error


def restricted(metric, order):
    if metric is None:
        return None
    return metric[order] if metric.dim() == 1 else metric[order][:, order]


@pytest.mark.parametrize(("spec", "metric_kind"), PAIRS, ids=named)
@settings(max_examples=4, deadline=None)
@given(width=st.integers(6, 12), hidden=st.integers(5, 16), seed=st.integers(0, 10**6), bias=st.booleans())
def test_identities(spec, metric_kind, width, hidden, seed, bias):
    structure, world = STRUCTURES.build(spec), World(metric_kind, width, hidden, seed, bias=bias)
    for group in world.groups(structure):
        problem = world.problem(structure, group)
        limit = structure.limit(group)
        fit = structure.fit(problem, limit)
        assert len(fit.error) == limit + 1
        whole = max(float(fit.error[0]), 1e-12)
        # What these drop may have cancelled out, and so may the rounding errors of fewer bits.
        if spec["kind"] != "split_affine" and not structure.rounds() and spec.get("correction") != "none":
            assert (fit.error.diff() <= 1e-9 * whole).all(), "the error must fall with the size"
        for size in sorted({1, 2, limit // 2, limit - 1, limit} & set(range(1, limit + 1))):
            model, numbers = world.compressed(structure, group, fit.tensors, size)
            assert numbers == structure.numbers(group, size, fit.tensors), "numbers by formula are numbers stored"
            claimed, measured = float(fit.error[size]), own_error(structure, world, problem, fit.tensors, model)
            if structure.optimised_at_size:
                assert measured <= claimed + 1e-9 * whole
            else:
                assert measured == pytest.approx(claimed, rel=1e-6, abs=1e-9 * whole)
        if spec["kind"] in LOSSY or structure.rounds():
            continue
        model, _ = world.compressed(structure, group, fit.tensors, limit)
        for layer in {m.layer for m in group}:
            torch.testing.assert_close(world.ffn(model, layer), world.ffn(world.dense(), layer), atol=1e-8, rtol=1e-8)
        for m in group:
            if structure.bias_name is not None:
                found = matrix_of(model.get_submodule(m.module), m.shape[1])
                torch.testing.assert_close(found, world.weights[m.name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_groups_hold_a_matrix_once_and_same_input_gives_same_bytes(spec):
    structure, world = STRUCTURES.build(spec), World("gram" if STRUCTURES[spec["kind"]].objective == "metric" else None, 8, 12, 3)
    names = [m.name for group in structure.groups(world.matrices) for m in group]
    assert len(names) == len(set(names))
    for group in world.groups(structure):
        fits = [structure.fit(world.problem(structure, group), 3) for _ in range(2)]
        for name, tensor in fits[0].tensors.items():
            assert torch.equal(tensor, fits[1].tensors[name])
        parts = [structure.stored(group, fit.tensors, 2) for fit in fits]
        for name, part in parts[0].items():
            assert all(torch.equal(tensor, parts[1][name].tensors[key]) for key, tensor in part.tensors.items())


def permuted_neurons(problem: Problem, order) -> Problem:
    """The same FFN with its neurons in another order."""
    *inner, down = problem.group
    weights = {m.name: problem.weights[m.name][order] for m in inner} | {down.name: problem.weights[down.name][:, order]}
    biases = {name: b if name == down.name else b[order] for name, b in problem.biases.items()}
    hidden = {k: v[order][:, order] if k == "gram" else v[order] for k, v in problem.sites[down.name].items()}
    outputs = {m.name: {k: restricted(v, order) for k, v in problem.outputs[m.name].items()} for m in inner}
    outputs[down.name] = problem.outputs[down.name]
    return replace(problem, weights=weights, biases=biases, outputs=outputs, sites={**problem.sites, down.name: hidden})


def permuted_inputs(problem: Problem, order, on_columns: bool) -> Problem:
    """Matrices whose inputs come in another order."""
    sites = {
        name: {k: restricted(v, order) if k == "gram" else v[order] for k, v in s.items()} for name, s in problem.sites.items()
    }
    weights = {name: w[:, order] for name, w in problem.weights.items()}
    labels = {name: v[order] if on_columns else v for name, v in problem.labels.items()}
    return replace(problem, weights=weights, sites=sites, labels=labels)


# Inputs that share a scale by their places are others in another order.
ORDERED = [(s, m) for s, m in PAIRS if "random" not in s.values() and "group" not in s]


@pytest.mark.parametrize(("spec", "metric_kind"), ORDERED, ids=named)
def test_the_order_of_channels_changes_nothing(spec, metric_kind):
    """T10: neurons of an FFN, and inputs of a matrix, may come in any order."""
    structure, world = STRUCTURES.build(spec), World(metric_kind, 9, 14, 4)
    for group in world.groups(structure):
        if structure.optimised_at_size and metric_kind == "weights":
            continue  # what is chained cannot turn inputs alone; tests/unit/test_coupled.py turns both
        problem = world.problem(structure, group)
        of_ffn = structure.bias_name is None
        order = torch.randperm(group[-1].shape[1], generator=torch.Generator().manual_seed(1))
        clustering = structure.clustering()
        on_columns = clustering is None or not clustering.on_rows(group[0])
        other = permuted_neurons(problem, order) if of_ffn else permuted_inputs(problem, order, on_columns)
        size = min(4, structure.limit(group))
        models = [world.compressed(structure, group, structure.fit(p, size).tensors, size)[0] for p in (problem, other)]
        if of_ffn:
            outputs = [world.ffn(model, group[0].layer) for model in models]
            torch.testing.assert_close(outputs[0], outputs[1], atol=1e-7, rtol=1e-7)
        else:
            for m in group:
                plain, moved = (matrix_of(model.get_submodule(m.module), m.shape[1]) for model in models)
                torch.testing.assert_close(moved, plain[:, order], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("spec", [small(kind) for kind in FITTED], ids=named)
@pytest.mark.parametrize(("width", "hidden"), [(8, 8), (32, 48), (6, 300)])
def test_largest_is_the_break_even_size(spec, width, hidden):
    structure, world = STRUCTURES.build(spec), World("weights", width, hidden, 5, tokens=400)
    if structure.clustering() or spec["kind"] == "tiers":
        pytest.skip("what these store depends on the data; the factors are cut where they are fitted")
    for group in structure.groups(world.matrices):
        largest, dense = structure.largest(group), sum(m.shape[0] * m.shape[1] for m in group)
        dense += sum(m.shape[0] for m in group) if structure.bias_name is None else 0
        assert largest == 0 or structure.numbers(group, largest, {}) < dense
        assert largest == structure.limit(group) or structure.numbers(group, largest + 1, {}) >= dense


def broken(world: World, how: str) -> World:
    """Statistics as bad as they come."""
    for key, x in world.inputs.items():
        if how == "rank-deficient":
            x = x[:, :1] * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
        elif how == "constant channel":
            x = x.clone()
            x[0] = 1.0
            x[1] = 0.0
        elif how == "scales of 1e8":
            x = x * torch.logspace(-4, 4, len(x), dtype=x.dtype)[:, None]
        elif how == "zero":
            x = torch.zeros_like(x)
        elif how == "nan":
            x = x.clone()
            x[-1, 3] = float("nan")
        world.inputs[key] = x
    for layer in (0, 1):
        block, x = world.dense().layers[layer], world.inputs[layer, "ffn_input"].T
        with torch.no_grad():
            world.inputs[layer, "ffn_hidden"] = (block.act(block.gate_proj(x)) * block.up_proj(x)).T
    if how in ("rank-deficient", "zero", "nan"):
        world.gradients = {name: g[:, :1] * (how != "zero") + 0 * g for name, g in world.gradients.items()}
    return world


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_a_size_alone_is_stored_as_from_the_fit_of_all(spec, monkeypatch):
    """Bit by bit, although it is fitted without those that are not rounded at once with it: here two forms of a square matrix."""
    monkeypatch.setattr(rounded, "NUMBERS", 2 * 12 * 12)
    structure = STRUCTURES.build(spec)
    world = World(metrics_of(spec)[-1], width=12, hidden=20, seed=5)
    for group in world.groups(structure):
        problem = world.problem(structure, group)
        whole = structure.fit(problem, structure.largest(group))
        for size in range(1, len(whole.error)):
            alone = structure.fit_at(problem, size)
            assert alone.keys() <= whole.tensors.keys()
            expected, found = (structure.stored(group, tensors, size) for tensors in (whole.tensors, alone))
            assert found.keys() == expected.keys()
            for module, part in expected.items():
                assert found[module].layout == part.layout
                assert found[module].tensors.keys() == part.tensors.keys()
                for name, tensor in part.tensors.items():
                    assert torch.equal(found[module].tensors[name], tensor), (module, name, size)
        if structure.kind() in ALONE and len(whole.error) > 2:
            assert len(structure.fit_at(problem, 1)) < len(whole.tensors)


@pytest.mark.parametrize("member", [*default()["methods"]["winnow"]["structure"]["members"], *ROUNDED_PARTS], ids=named)
def test_the_forecast_of_a_file_is_that_of_the_tensors_in_it(member):
    """Of the members of `winnow`, of which a large model's disk holds all."""
    structure, metric = STRUCTURES.build(member), "two_sided" if STRUCTURES[member["kind"]].objective == "metric" else None
    world = World(metric, width=48, hidden=96, seed=6, bias=False)
    for group in world.groups(structure):
        fit = structure.fit(world.problem(structure, group), structure.largest(group))
        stored = sum(tensor.nbytes for tensor in storable(structure, fit).values())
        needs = METRICS[metric].needs if metric else ()
        assert structure.work(group, needs)[2] == pytest.approx(stored, rel=0.1), group[0].role


@pytest.mark.parametrize("how", ["rank-deficient", "constant channel", "scales of 1e8", "zero", "nan"])
@pytest.mark.parametrize(("spec", "metric_kind"), PAIRS, ids=named)
def test_bad_statistics_end_in_a_right_answer_or_a_named_error(spec, metric_kind, how):
    structure, world = STRUCTURES.build(spec), broken(World(metric_kind, 8, 12, 11), how)
    refusals: list[str] = []
    for group in world.groups(structure):
        try:
            problem = world.problem(structure, group)
            fit = structure.fit(problem, structure.limit(group))
        except (FloatingPointError, ValueError) as error:
            refusals.append(str(error))
            continue
        uses = {need for site in problem.sites.values() for need in site}
        assert how != "nan" or not uses, "statistics that are not finite must not go through"
        assert torch.isfinite(fit.error).all()
        assert all(torch.isfinite(t).all() for t in fit.tensors.values() if t.is_floating_point())
        if spec["kind"] in LOSSY or structure.rounds() or how == "nan":
            continue
        model, _ = world.compressed(structure, group, fit.tensors, structure.limit(group))
        for m in group:
            if structure.bias_name is not None:
                found = matrix_of(model.get_submodule(m.module), m.shape[1])
                torch.testing.assert_close(found, world.weights[m.name], atol=1e-7, rtol=1e-7)
        for layer in {m.layer for m in group}:
            dense = world.ffn(world.dense(), layer)
            torch.testing.assert_close(world.ffn(model, layer), dense, atol=1e-6 * float(dense.abs().max()), rtol=1e-6)
    words = {"nan": "not finite", "zero": "zero|distinct", "rank-deficient": "distinct|singular", "constant channel": "distinct"}
    assert all(re.search(words.get(how, "never"), line) for line in refusals), refusals


def test_registry_describes_every_entry():
    for cls in (*STRUCTURES.values(), *METRICS.values()):
        assert cls.__doc__
        assert cls.reference
        assert cls.version >= 1
        assert cls.kind()
