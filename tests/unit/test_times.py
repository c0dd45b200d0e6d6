"""Bounds on measured time: the programme against brute force, what is measured of every family, and what is refused."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.conftest import plain
from tests.unit.test_allocation import budget
from tests.unit.test_allocations import random_groups
from winnow.allocation import time_forms as timed
from winnow.allocation.base import ALLOCATIONS, stored_bytes
from winnow.allocation.groups import Group, allocate
from winnow.allocation.kinds.ilp import options_of
from winnow.allocation.time_forms import filled, time_forms
from winnow.allocation.times import Timing, shapes_of, with_times
from winnow.api.compression import compress
from winnow.errors import InputError
from winnow.models.architectures import Matrix
from winnow.models.shape import shape_of
from winnow.numerics.modules import RoundedLinear
from winnow.planning.config import load
from winnow.planning.plan import Plan
from winnow.structures.base import STRUCTURES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
MEMBERS = [{"kind": "gauge_fixed"}, {"kind": "neuron_slice"}, {"kind": "affine_block"}, {"kind": "rounded", "bits": [2, 4, 8]}]
MIXED = STRUCTURES.build({"kind": "mixed", "members": MEMBERS})


def timed_groups(seed, count, sides=(8, 20)):
    """Groups whose seconds grow with the size, from a share of the dense seconds to more than them."""
    draws, groups = np.random.default_rng(seed), []
    for g in random_groups(seed, count, sides):
        dense = float(draws.uniform(1, 3))
        times = dense * np.linspace(draws.uniform(0.1, 0.5), draws.uniform(0.9, 1.4), len(g.numbers))
        groups.append(replace(g, times=times.tolist(), dense_time=dense))
    return groups


@pytest.mark.parametrize(("seed", "keep"), [*product(range(4), (0.6, 0.75, 1.0))])
def test_the_programme_is_the_best_of_all_allocations_within_bytes_and_time(seed, keep):
    groups = timed_groups(seed, 4)
    dense, limit = sum(g.dense for g in groups), keep * sum(g.dense_time for g in groups)
    tables = [options_of(g, g.predicted, True) for g in groups]
    totals, losses, times = (sum(np.meshgrid(*(getattr(t, key) for t in tables), indexing="ij")) for key in KEYS)
    fits = (totals <= 0.6 * dense) & (times <= limit * (1 + 1e-9))
    best = losses[fits].min()
    ilp = ALLOCATIONS.build({"kind": "ilp", "sizes": 64, "gap": 0.0, "time": {"keep": keep}})
    choice = ilp.allocate(groups, 0.6)
    assert choice.facts["value"] == pytest.approx(best, rel=1e-6)
    assert choice.facts["bound"] <= best * (1 + 1e-9)
    assert choice.facts["time"]["keep"] <= keep * (1 + 1e-6)
    assert stored_bytes(groups, choice.sizes) <= 0.6 * dense


KEYS = ("bytes", "losses", "times")


def test_less_time_loses_more_and_a_bound_that_does_not_bind_changes_nothing():
    groups = timed_groups(3, 40, sides=(48, 128))
    values = []
    for keep in (0.65, 0.75, 0.9, 5.0):
        choice = ALLOCATIONS.build({"kind": "ilp", "time": {"keep": keep}}).allocate(groups, 0.7)
        assert choice.facts["time"]["keep"] <= keep * (1 + 1e-6)
        assert choice.facts["bound"] <= choice.facts["value"]
        values.append(choice.facts["value"])
    assert values == sorted(values, reverse=True)
    free = ALLOCATIONS.build({"kind": "ilp"}).allocate(groups, 0.7).facts
    assert values[-1] == pytest.approx(free["value"], rel=1e-3)


def test_bounds_that_cannot_be_met_are_refused():
    groups = timed_groups(0, 6, sides=(48, 128))
    with pytest.raises(InputError, match=r"`time\.keep` 0\.01 cannot be met: the fastest forms take 0\.\d+ of the time"):
        allocate(groups, budget(keep_bytes=0.9, allocation={"kind": "ilp", "time": {"keep": 0.01}}))
    fast = {"kind": "ilp", "time": {"keep": 0.55}}
    choice = allocate(groups, budget(keep_bytes=0.9, allocation=fast))
    assert choice.facts["time"]["keep"] <= 0.55 * (1 + 1e-6)
    assert stored_bytes(groups, choice.sizes) < 0.85 * sum(g.dense for g in groups), "the time leaves bytes unused"
    with pytest.raises(InputError, match=r"keep_bytes 0\.001 with `time\.keep: 0\.55` cannot be met within 0\.5%: the nearest"):
        allocate(groups, budget(keep_bytes=0.001, allocation=fast))


def test_every_form_of_every_family_is_measured_and_read_back(saved_model, monkeypatch):
    """By a clock of multiplications instead of seconds, so that the ratios are those of the shapes."""
    monkeypatch.setattr(timed, "clock_of", lambda device: lambda call: (call(), 1.0)[1])
    matrices = shape_of(saved_model).matrices
    timing = Timing(keep=1, sizes=3, repeats=6)
    record = json.loads(json.dumps(time_forms(matrices, MIXED, timing, "float32", "cpu")))
    assert sum(row["matrices"] for row in record["dense"]) == len(matrices)
    assert all(row["ratio"]["median"] == 1 for row in record["forms"])
    groups = []
    for name, own, group in MIXED.fits(matrices):
        numbers = [0] * (own.largest(group) + 1)
        groups.append(Group(name, group, own, 4, 0, 1, numbers, [0.0] * len(numbers)))
    for g in with_times(groups, record):
        assert g.times == pytest.approx([g.dense_time] * len(g.numbers))
        assert g.dense_time > 0


def matrix(shape):
    return Matrix(0, "q_proj", "q", "site", shape, False, False)


def test_times_between_measured_sizes_are_interpolated_but_not_those_of_forms():
    low_rank, rounded = (STRUCTURES.build({"kind": "low_rank"}), STRUCTURES.build({"kind": "rounded", "bits": [2, 3, 8]}))
    m = matrix((64, 64))
    assert low_rank.timed_sizes([m], 3) == [1, 16, 31]
    assert low_rank.timed_sizes([matrix((4, 4))], 6) == [1]
    assert rounded.timed_sizes([m], 2) == [1, 2, 3]
    side = {"outputs": 64, "inputs": 64, "bias": False}
    forms = [{"structure": "low_rank", "matrices": [side], "size": s, "ratio": {"median": r}} for s, r in ((1, 0.2), (31, 0.8))]
    record = {"dense": [{**side, "seconds": {"median": 2.0}}], "forms": forms}
    (g,) = with_times([Group("0", [m], low_rank, 4, 0, 1, [0] * 32, [0.0] * 32)], record)
    assert g.seconds(16) == pytest.approx(2 * 0.5)
    assert g.seconds(None) == 2.0
    with pytest.raises(InputError, match=r"the time of q \(32 x 64\) was not measured"):
        with_times([Group("0", [matrix((32, 64))], low_rank, 4, 0, 1, [0], [0.0])], record)


def test_random_modules_compute_finite_numbers_of_ordinary_size():
    module = filled(RoundedLinear(70, 8, 3, 32, False, zeros=True), torch.bfloat16, "cpu")
    with torch.no_grad():
        y = module(torch.randn(1, 70, dtype=torch.bfloat16))
    assert torch.isfinite(y).all()
    assert float(y.abs().max()) > 1e-3, "no denormal numbers, with which processors are slow"


def test_a_gpu_that_is_asked_for_and_not_there_is_refused():
    with pytest.raises(InputError, match="there is no GPU here"):
        time_forms([matrix((8, 8))], MIXED, Timing(keep=1, device="cuda"), "float32", "cpu")


def plan_of(time, method="whitened_ilp"):
    config = plain()
    config["budgets"] = {"b": {"targets": ["ffn"], "keep_bytes": 0.6, "allocation": {"kind": "ilp", "time": time}}}
    config["experiments"]["demo"].update(methods=[method], budgets=["b"])
    return Plan(load(config), ".")


def label_of(plan, method="whitened_ilp"):
    return plan.timing_label(plan.labels["methods"][method], plan.labels["budgets"]["b"])


def test_times_are_shared_by_bounds_and_by_methods_of_one_structure():
    one = plan_of({"keep": 0.7})
    assert label_of(one) == label_of(plan_of({"keep": 0.5})) == label_of(plan_of({"keep": 0.7}, "svd"), "svd")
    assert label_of(one) != label_of(plan_of({"keep": 0.7, "dtype": "bfloat16"}))
    assert label_of(one) != label_of(plan_of({"keep": 0.7}, "winnow"), "winnow")
    assert label_of(one) in one.all_labels()
    assert one.knows("timing", label_of(one))
    assert Plan(load(plain()), ".").timings() == {}


def test_structures_whose_forms_depend_on_the_fit_are_refused_by_the_configuration(saved_llama):
    config = plain()
    time = {"kind": "ilp", "objective": "metric", "time": {"keep": 0.7}}
    config["budgets"] = {"b": {"targets": ["ffn"], "keep_bytes": 0.6, "allocation": time}}
    config["experiments"]["demo"].update(methods=["clusters_norm"], budgets=["b"])
    with pytest.raises(InputError, match=r"budget 'b' bounds the time, which can be measured for .*low_rank.*, not for cluster"):
        load(config)
    method = {
        "structure": {"kind": "low_rank"},
        "metric": {"kind": "weights"},
        "allocation": {"kind": "ilp", "time": {"keep": 1}},
    }
    with pytest.raises(InputError, match=r"allocation 'ilp': needs jobs of its own"):
        compress(saved_llama, torch.zeros(2, 8, dtype=torch.int64), method)


def test_shapes_and_biases_decide_what_is_measured():
    assert shapes_of([matrix((8, 4)), replace(matrix((8, 4)), bias=True)]) == ((8, 4, False), (8, 4, True))
