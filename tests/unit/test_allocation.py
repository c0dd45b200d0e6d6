"""Budgets: bytes met, rounding spent, and what cannot be met refused with the break-even rank."""

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from winnow.allocation.groups import TOLERANCE, Group, allocate, chosen_groups, summarize
from winnow.errors import InputError
from winnow.io.artifacts import write_json
from winnow.models.architectures import Matrix, group_name
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.structures.base import STRUCTURES

LOW_RANK = STRUCTURES.build({"kind": "low_rank"})


def group(index, shape, bias=False, unit=2):
    matrix = Matrix(index, "up_proj", f"layers.{index}.up_proj", "ffn_input", shape, False, bias)
    fixed = shape[0] * unit if bias else 0
    numbers = [LOW_RANK.numbers([matrix], size, {}) for size in range(LOW_RANK.largest([matrix]) + 1)]
    error = [float(100 - i) for i in range(len(numbers))]
    return Group(matrix.name, [matrix], LOW_RANK, unit, fixed, shape[0] * shape[1] * unit + fixed, numbers, error)


def budget(**given):
    return {"keep_bytes": None, "rank": None, "rank_fraction": None, "allocation": {"kind": "uniform"}, **given}


def uniform(groups, keep):
    return allocate(groups, budget(keep_bytes=keep)).sizes


SHAPES = st.lists(st.tuples(st.integers(32, 256), st.integers(32, 256), st.booleans()), min_size=12, max_size=40)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.2, 0.9))
def test_bytes_are_met_and_never_exceeded(shapes, keep):
    groups = [group(i, (m, n), bias) for i, (m, n, bias) in enumerate(shapes)]
    dense = sum(g.dense for g in groups)
    # A model of a few small matrices has ranks too coarse for the tolerance: uniform() then refuses, as it must.
    assume(max(g.bytes(2) - g.bytes(1) for g in groups) <= TOLERANCE * dense)
    sizes = uniform(groups, keep)
    stored = sum(g.bytes(sizes[g.name]) for g in groups)
    assert stored <= keep * dense + 1e-6
    assert stored >= (keep - TOLERANCE) * dense
    left = keep * dense - stored
    raised = [g for g in groups if g.bytes(sizes[g.name]) > keep * g.dense]
    assert raised or left < max(g.bytes(2) - g.bytes(1) for g in groups), "rounding is spent"
    for g in groups:
        step = g.bytes(sizes[g.name]) - g.bytes(sizes[g.name] - 1)
        assert abs(g.bytes(sizes[g.name]) - keep * g.dense) <= step, "nobody is more than one step from its share"


def test_uniform_is_deterministic_and_grows_with_the_budget():
    groups = [group(i, (128, 352 - i)) for i in range(12)]
    before = None
    for keep in (0.3, 0.4, 0.6, 0.8, 0.95):
        sizes = uniform(groups, keep)
        assert sizes == uniform(list(reversed(groups)), keep)
        assert before is None or all(sizes[n] >= before[n] for n in sizes)
        before = sizes


def test_ranks_and_fractions():
    groups = [group(0, (128, 352)), group(1, (64, 128))]
    assert allocate(groups, budget(rank=20)).sizes == {"000.up_proj": 20, "001.up_proj": 20}
    assert allocate(groups, budget(rank_fraction=0.25)).sizes == {"000.up_proj": 32, "001.up_proj": 16}


def test_ranks_by_target():
    group = [Matrix(0, role, f"layers.0.{role}", "attention_input", (64, 64), False, False) for role in ("q_proj", "o_proj")]
    groups = [Group(m.name, [m], LOW_RANK, 2, 0, 8192, list(range(0, 4096, 128)), [1.0] * 32) for m in group]
    assert allocate(groups, budget(rank={"qkv": 7, "o_proj": 9})).sizes == {"000.q_proj": 7, "000.o_proj": 9}
    assert allocate(groups, budget(rank_fraction={"qkv": 0.25, "o_proj": 0.125})).sizes == {"000.q_proj": 16, "000.o_proj": 8}
    both = Group("both", group, STRUCTURES.build({"kind": "shared_basis"}), 2, 0, 8192, list(range(0, 4096, 128)), [1.0] * 32)
    with pytest.raises(InputError, match="shared_basis fits q_proj, o_proj together; give them the same rank"):
        allocate([both], budget(rank={"qkv": 7, "o_proj": 9}))


def test_a_rank_beyond_break_even_is_refused_with_the_number():
    """The seed's "3072 + 256" on 4096 x 14336 stores more than dense; its break-even rank is 3185."""
    with pytest.raises(InputError, match=r"rank 3328 of layers\.0\.up_proj \(4096 x 14336\).*break-even rank, 3185"):
        allocate([group(0, (4096, 14336))], budget(rank=3328))


@pytest.mark.parametrize("keep", [1.0, 0.999, 0.0001])
def test_bytes_that_the_form_cannot_meet_are_refused(keep):
    with pytest.raises(InputError, match=r"cannot be met.*can store rank 1 to 15, its break-even rank"):
        allocate([group(i, (32, 32)) for i in range(3)], budget(keep_bytes=keep))


def test_a_form_that_never_saves_is_refused():
    bypass = STRUCTURES.build({"kind": "bypass", "kept": 16})
    matrix = Matrix(0, "up_proj", "layers.0.up_proj", "ffn_input", (32, 32), False, False)
    with pytest.raises(InputError, match=r"bypass of layers\.0\.up_proj \(32 x 32\) stores more than dense at every size"):
        uniform([Group(matrix.name, [matrix], bypass, 2, 0, 2048, [1024], [1.0])], 0.8)


def test_summary_adds_up():
    groups = [group(0, (64, 96), bias=True), group(1, (64, 64))]
    sizes = uniform(groups, 0.5)
    result = summarize(groups, sizes)
    assert result["stored_bytes"] == sum(g.bytes(sizes[g.name]) for g in groups)
    assert result["keep_bytes"] == pytest.approx(0.5, abs=TOLERANCE)
    assert result["groups"][0]["relative_error"] == pytest.approx((100 - sizes["000.up_proj"]) / 100)


def test_a_form_that_does_not_apply_is_refused_by_the_matrix(saved_llama, tmp_path):
    write_json(tmp_path / "model.json", describe(saved_llama))
    files, slices = ModelFiles(tmp_path / "model.json"), STRUCTURES.build({"kind": "neuron_slice"})
    names = [group_name(g) for g in slices.groups(files.matrices)]
    spectra = pd.DataFrame({"group": names, "numbers": [[0, 1]] * len(names), "error": [[1.0, 0.0]] * len(names)})
    with pytest.raises(InputError, match=r"neuron_slice does not apply to q_proj \(model\.layers\.0\.self_attn\.q_proj\)"):
        chosen_groups(files, slices, ["ffn", "attention"], spectra.set_index("group"))
    with pytest.raises(InputError, match="fits gate_proj, up_proj, down_proj together"):
        chosen_groups(files, slices, ["down_proj"], spectra.set_index("group"))
