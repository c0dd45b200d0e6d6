"""Kinds of allocations: bytes met by all, the integer programme against brute force and its bound, dense matrices, and files."""

import itertools

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, plain
from tests.unit.test_allocation import LOW_RANK, budget
from winnow.allocation.base import ALLOCATIONS, stored_bytes
from winnow.allocation.groups import TOLERANCE, Group, allocate, summarize
from winnow.allocation.kinds.ilp import options_of
from winnow.checkpoint.writer import recipe_of
from winnow.errors import InputError
from winnow.models.architectures import Matrix
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
EVERY = [{"kind": kind} for kind in ALLOCATIONS] + [
    {"kind": "greedy", "objective": "predicted"},
    {"kind": "greedy", "objective": "relative", "leave_dense": False},
    {"kind": "ilp", "objective": "metric"},
    {"kind": "ilp", "objective": "relative"},
    {"kind": "ilp", "leave_dense": False},
    {"kind": "energy", "leave_dense": False},
]
LEAVES_DENSE = [{"kind": "greedy", "objective": "predicted"}, {"kind": "ilp"}, {"kind": "energy"}]


def random_groups(seed, count, sides=(48, 128), unit=4):
    """Matrices of random shapes whose spectra fall at different speeds; the predicted loss is the error times a sensitivity."""
    draws = np.random.default_rng(seed)
    groups = []
    for i in range(count):
        m, n = (int(side) for side in draws.integers(*sides, size=2))
        matrix = Matrix(i, ("q_proj", "up_proj", "down_proj")[i % 3], f"layers.{i}.x", "site", (m, n), False, False)
        numbers = [LOW_RANK.numbers([matrix], size, {}) for size in range(LOW_RANK.largest([matrix]) + 1)]
        squares = np.exp(-draws.uniform(1.0, 10.0) * np.arange(min(m, n)) / min(m, n)) * draws.uniform(0.5, 2.0)
        error = np.append(squares[::-1].cumsum()[::-1], 0.0)[: len(numbers)]
        predicted = error * np.exp(draws.normal() * 2) * 0.01
        groups.append(Group(matrix.name, [matrix], LOW_RANK, unit, 0, m * n * unit, numbers, error.tolist(), predicted.tolist()))
    return groups


def loss(groups, sizes):
    return sum(g.predicted[sizes[g.name]] for g in groups if sizes[g.name] is not None)


@pytest.mark.parametrize("allocation", EVERY, ids=str)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.sampled_from([0.3, 0.5, 0.8, 0.9]))
def test_every_kind_meets_the_bytes_and_never_exceeds_them(allocation, seed, keep):
    groups = random_groups(seed, 30)
    sizes = allocate(groups, budget(keep_bytes=keep, allocation=allocation)).sizes
    dense = sum(g.dense for g in groups)
    assert (keep - TOLERANCE) * dense <= stored_bytes(groups, sizes) <= keep * dense
    assert set(sizes) == {g.name for g in groups}
    assert all(size is None or 1 <= size <= g.largest for g in groups for size in [sizes[g.name]])
    if not allocation.get("leave_dense", True):
        assert None not in sizes.values()
    again = allocate(list(reversed(groups)), budget(keep_bytes=keep, allocation=allocation)).sizes
    assert again == sizes, "neither chance nor order plays a part"


def best_of(losses, totals, allowed, dense):
    """The least of the losses whose bytes are allowed; where it leaves more than the tolerance, of those that do not, if any."""
    fits = totals <= allowed
    best, near = float(losses[fits].min()), fits & (totals >= allowed - TOLERANCE * dense)
    return float(losses[near].min()) if near.any() and not (near & (losses == best)).any() else best


@pytest.mark.parametrize("seed", range(12))
def test_the_integer_programme_is_the_best_of_all_allocations_on_small_cases(seed):
    """Every allocation of four groups, dense ones included, by brute force."""
    groups = random_groups(seed, 4, sides=(8, 20))
    allowed = (0.45 + 0.04 * seed) * sum(g.dense for g in groups)
    tables = [options_of(g, g.predicted, True) for g in groups]
    totals = sum(np.meshgrid(*(t.bytes for t in tables), indexing="ij"))
    losses = sum(np.meshgrid(*(t.losses for t in tables), indexing="ij"))
    best = best_of(losses, totals, allowed, sum(g.dense for g in groups))
    ilp = ALLOCATIONS.build({"kind": "ilp", "sizes": 64, "gap": 0.0})
    choice = ilp.allocate(groups, allowed / sum(g.dense for g in groups))
    assert stored_bytes(groups, choice.sizes) <= allowed
    assert loss(groups, choice.sizes) == pytest.approx(best, rel=1e-6)
    assert choice.facts["value"] == pytest.approx(best, rel=1e-6)
    assert choice.facts["bound"] <= best * (1 + 1e-9)


def test_the_bound_is_that_of_the_linear_relaxation():
    """Against HiGHS on the relaxed programme over all sizes."""
    from scipy.optimize import linprog

    groups = random_groups(3, 12)
    facts = ALLOCATIONS.build({"kind": "ilp"}).allocate(groups, 0.6).facts
    tables = [options_of(g, g.predicted, True) for g in groups]
    counts = [len(t.sizes) for t in tables]
    one_each = np.zeros((len(groups), sum(counts)))
    for row, (start, count) in enumerate(zip(itertools.accumulate([0, *counts[:-1]]), counts, strict=True)):
        one_each[row, start : start + count] = 1
    relaxed = linprog(
        np.concatenate([t.losses for t in tables]),
        A_ub=np.concatenate([t.bytes for t in tables])[None],
        b_ub=[0.6 * sum(g.dense for g in groups)],
        A_eq=one_each,
        b_eq=np.ones(len(groups)),
    )
    assert facts["bound"] == pytest.approx(relaxed.fun, rel=1e-6)


def test_large_programmes_reach_their_bound_and_beat_the_other_kinds():
    """32 layers of 7 matrices."""
    groups = random_groups(5, 32 * 7, sides=(256, 1024))
    for keep in (0.9, 0.6):
        choice = allocate(groups, budget(keep_bytes=keep, allocation={"kind": "ilp"}))
        facts = choice.facts
        assert facts["status"] == "optimal"
        assert facts["bound"] <= facts["value"] <= facts["bound"] * 1.001
        assert facts["gap"] == pytest.approx(1 - facts["bound"] / facts["value"])
        assert facts["options"] >= 32 * 7 * 16
        for other in ({"kind": "uniform"}, {"kind": "energy"}, {"kind": "greedy"}, {"kind": "greedy", "objective": "predicted"}):
            sizes = allocate(groups, budget(keep_bytes=keep, allocation=other)).sizes
            assert facts["value"] <= loss(groups, sizes) * (1 + 1e-6), other


def test_the_node_limit_stops_at_the_same_allocation_every_time():
    groups = random_groups(1, 30)
    first, again, whole = (
        allocate(groups, budget(keep_bytes=0.3, allocation={"kind": "ilp", "gap": 0.0, "nodes": nodes}))
        for nodes in (1, 1, 10_000)
    )
    assert (first.facts["status"], whole.facts["status"]) == ("stopped at the node limit", "optimal")
    assert first.sizes == again.sizes
    assert first.facts["value"] > whole.facts["value"] >= first.facts["bound"]


def test_greedy_on_the_same_objective_comes_close_to_the_bound():
    groups = random_groups(6, 100)
    bound = allocate(groups, budget(keep_bytes=0.7, allocation={"kind": "ilp"})).facts["bound"]
    greedy = allocate(groups, budget(keep_bytes=0.7, allocation={"kind": "greedy", "objective": "predicted"})).sizes
    assert bound <= loss(groups, greedy) <= 1.05 * bound


def test_greedy_takes_the_largest_singular_values():
    """Squares of equal matrices: those kept are exactly the largest of all."""
    values = np.array([[9.0, 7.0, 1.0, 0.5], [8.0, 6.0, 5.0, 0.1]])
    groups = []
    for i, squares in enumerate(values):
        matrix = Matrix(i, "up_proj", f"layers.{i}.x", "site", (100, 100), False, False)
        error = np.append(squares[::-1].cumsum()[::-1], 0.0).tolist()
        groups.append(Group(matrix.name, [matrix], LOW_RANK, 1, 0, 10000, [200 * k for k in range(5)], error))
    greedy = ALLOCATIONS.build({"kind": "greedy", "leave_dense": False})
    assert greedy.allocate(groups, 1000 / 20000).sizes == {"000.up_proj": 2, "001.up_proj": 3}


@pytest.mark.parametrize("allocation", LEAVES_DENSE, ids=str)
def test_what_is_sensitive_stays_dense(allocation):
    groups = random_groups(1, 30)
    hard = groups[4]
    flat = np.linspace(1.0, 0.5, len(hard.error))
    groups[4] = Group(**{**vars(hard), "error": flat.tolist(), "predicted": (1e3 * flat).tolist()})
    choice = allocate(groups, budget(keep_bytes=0.7, allocation=allocation))
    assert choice.sizes[hard.name] is None
    summary = summarize(groups, choice.sizes)
    row = next(row for row in summary["groups"] if row["group"] == hard.name)
    assert (row["size"], row["stored_bytes"], row["relative_error"]) == (None, hard.dense, 0.0)
    assert summary["stored_bytes"] == stored_bytes(groups, choice.sizes)
    assert summary["predicted"] == pytest.approx(loss(groups, choice.sizes))
    recipe = recipe_of({}, {}, summary)
    assert recipe["kept_dense"][hard.name] == hard.dense
    assert hard.name not in recipe["sizes"]
    assert len(recipe["sizes"]) + len(recipe["kept_dense"]) == len(groups)


@pytest.mark.parametrize("allocation", LEAVES_DENSE, ids=str)
def test_all_bytes_kept_is_the_dense_model(allocation):
    groups = random_groups(2, 10)
    sizes = allocate(groups, budget(keep_bytes=1.0, allocation=allocation)).sizes
    assert set(sizes.values()) == {None}


@pytest.mark.parametrize("allocation", EVERY, ids=str)
def test_bytes_below_the_smallest_sizes_are_refused(allocation):
    with pytest.raises(InputError, match=r"keep_bytes 0\.0001 cannot be met within"):
        allocate(random_groups(0, 10), budget(keep_bytes=0.0001, allocation=allocation))


def test_more_bytes_never_lose_more():
    groups = random_groups(9, 40)
    losses = [
        allocate(groups, budget(keep_bytes=keep, allocation={"kind": "ilp"})).facts["value"] for keep in (0.3, 0.5, 0.7, 0.9)
    ]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


def test_types_keep_their_share_and_lossy_matrices_more():
    groups = random_groups(4, 30)
    sizes = allocate(groups, budget(keep_bytes=0.5, allocation={"kind": "per_type"})).sizes
    uniform = allocate(groups, budget(keep_bytes=0.5)).sizes
    for role in ("q_proj", "up_proj", "down_proj"):
        mine = [g for g in groups if g.matrices[0].role == role]
        kept = [g.bytes(sizes[g.name]) / g.dense for g in mine]
        assert 0.42 < sum(kept) / len(kept) < 0.58
        lossy = max(mine, key=lambda g: g.error[uniform[g.name]])
        spare = min(mine, key=lambda g: g.error[uniform[g.name]])
        assert lossy.bytes(sizes[lossy.name]) / lossy.dense > spare.bytes(sizes[spare.name]) / spare.dense


def per_type(norms, keep, **options):
    """Ranks of q matrices (100, 100), of at most 49, whose errors at the uniform rank have these norms; steps gain alike."""
    groups = []
    for i, norm in enumerate(norms):
        matrix = Matrix(i, "q_proj", f"layers.{i}.x", "site", (100, 100), False, False)
        error = [norm**2 * (1 + (50 * keep - size) / 100) for size in range(50)]
        groups.append(Group(matrix.name, [matrix], LOW_RANK, 1, 0, 10000, [200 * k for k in range(50)], error))
    return list(allocate(groups, budget(keep_bytes=keep, allocation={"kind": "per_type", **options})).sizes.values())


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e12])
def test_shares_of_a_type_are_as_one_over_the_logarithm_of_the_loss_in_no_unit(unit):
    """Logarithms of 8 and 16: shares removed are 2 to 1, 0.4 and 0.2 where all give up 0.3; of 2 and 10, 0.5 and 0.1."""
    assert per_type([unit, unit * np.exp(8)], 0.7) == [30, 40]
    assert per_type([unit, unit * np.exp(8)], 0.7, smallest=2) == [25, 45]


@pytest.mark.parametrize("norm", [0.0, 1e-13, 1e-3])
def test_a_matrix_that_loses_next_to_nothing_keeps_half_of_the_uniform_share_and_the_others_no_less(norm):
    """As q and o of SmolLM2's first layer, which were left with rank 1, and lost all."""
    for keep in (0.8, 0.6, 0.4):
        spare, *others = per_type([norm, 1.0, 1.0, 1.0, 1.0], keep)
        assert spare >= 50 * keep / 2
        assert min(others) >= 50 * keep


def test_what_is_not_predicted_is_named():
    groups = random_groups(0, 5)
    groups[2] = Group(**{**vars(groups[2]), "predicted": None})
    with pytest.raises(InputError, match=r"the loss of layers\.2\.x \(\d+ x \d+\) is not predicted"):
        allocate(groups, budget(keep_bytes=0.5, allocation={"kind": "ilp"}))


def refused(change):
    config = plain()
    change(config)
    with pytest.raises(InputError) as error:
        load(config)
    return str(error.value)


def allocated(kind, **options):
    return {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": {"kind": kind, **options}}


def test_a_configuration_that_cannot_be_allocated_is_refused_by_its_key():
    def of_rank(c):
        c["budgets"]["x"] = {"rank": 4, "allocation": {"kind": "ilp"}}

    def of_structure(c):
        c["budgets"]["x"] = allocated("ilp")
        c["experiments"]["demo"] |= {"methods": ["ffsplit"], "budgets": ["x"]}

    assert "budgets.x: allocation: ilp distributes bytes; give `keep_bytes`" in refused(of_rank)
    assert "budget 'x' needs predicted losses, which split (ffsplit) does not have" in refused(of_structure)
    line = refused(lambda c: c["budgets"].update(x=allocated("ilp", objective="metric", rounds=1)))
    assert "budgets.x.allocation: `rounds` need `objective: predicted`" in line
    assert "did you mean 'greedy'" in refused(lambda c: c["budgets"].update(x=allocated("gredy")))
    assert "did you mean 'nodes'" in refused(lambda c: c["budgets"].update(x=allocated("ilp", node=3)))


def test_every_structure_can_be_allocated_by_its_own_error():
    config = plain()
    config["budgets"]["x"] = allocated("ilp", objective="relative")
    config["experiments"]["demo"] |= {"methods": ["modegpt_mlp", "whitened"], "budgets": ["x"]}
    assert len(load(config).experiments["demo"].methods) == 2


def test_the_study_is_valid_and_asks_for_gradients_only_where_it_must():
    config = plain()
    study = yaml.safe_load((ROOT / "config" / "studies" / "allocation.yaml").read_text())
    for section, presets in study.items():
        config[section] |= presets
    plan = Plan(load(config), ROOT)
    asked = [name for name in plan.labels["budgets"] if plan.budget_name(name) == name]
    budgets = {name: plan.allocation(plan.labels["budgets"][name]) for name in asked}
    assert {name for name, a in budgets.items() if a.rounds()} == {f"all-{keep}-ilp-rounds" for keep in (0.9, 0.8, 0.6, 0.4)}
    assert {name for name, a in budgets.items() if a.learns} == {f"all-{keep}-learned" for keep in (0.9, 0.8, 0.6, 0.4)}
    assert not any(budgets[name].predicts() for name in ("all-0.8", "all-0.8-energy", "all-0.8-ilp-metric"))
    assert all(budgets[name].predicts() for name in ("all-0.8-ilp", "all-0.8-greedy"))
    label = plan.labels["budgets"]["all-0.8-ilp"]
    assert plan.labels["budgets"]["all-0.8"] == Plan(load(default()), ROOT).labels["budgets"]["all-0.8"]
    wildcards = {"model": plan.labels["models"]["demo"], "calibration": plan.labels["calibrations"]["demo"]}
    spec = plan.spec("compress", {**wildcards, "method": plan.labels["methods"]["kfac"], "budget": label})
    assert set(spec["allocation"]["libraries"]) == {"pulp"}
