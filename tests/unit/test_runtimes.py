"""The restriction of the integer programme to what a runtime runs: which sizes, and what is refused before any job."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import plain
from tests.unit.test_allocation import budget
from winnow.allocation.base import ALLOCATIONS, stored_bytes
from winnow.allocation.groups import Group, allocate
from winnow.allocation.runtimes import check_sizes, restricted
from winnow.checkpoint import packed
from winnow.engines.gguf.blocks import grid_of
from winnow.errors import InputError
from winnow.models.architectures import Matrix
from winnow.numerics import kernels
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import packed as packed_codes
from winnow.planning.config import load
from winnow.planning.plan import Plan
from winnow.planning.runtimes import check_runtimes
from winnow.structures.base import RUNTIMES, STRUCTURES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
FORMS = {"kind": "rounded", "bits": [2, 4, 8], "group": [8, 32, 64, 96, 128, None], "grids": ["full", "asymmetric"]}
SHAPES = [(32, 96), (40, 128), (64, 176), (64, 256), (16, 1024)]


def matrix(shape, role="q_proj", layer=0, transposed=False):
    return Matrix(layer, role, f"layers.{layer}.{role}", "site", shape, transposed, False)


def rounded_forms(shape, transposed=False):
    structure, own = STRUCTURES.build(FORMS), matrix(shape, transposed=transposed)
    return [(form, own, size, structure) for size, form in enumerate(structure.forms(*shape), start=1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_runs_the_forms_that_the_kernel_takes(shape):
    for form, own, size, structure in rounded_forms(shape):
        module = RoundedLinear(shape[1], shape[0], form.bits, form.group, False, form.grid == "asymmetric")
        x = torch.zeros(1, shape[1], dtype=torch.bfloat16)
        with torch.no_grad():
            assert structure.runs([own], size, "torch") == kernels.applies(module, x), (form, shape)


@pytest.mark.parametrize(("shape", "transposed"), [*product(SHAPES, (False, True))], ids=str)
def test_compressed_tensors_runs_the_forms_that_vllm_reads_from_the_export(shape, transposed):
    dense = nn.Module() if transposed else nn.Linear(shape[1], shape[0])
    for form, own, size, structure in rounded_forms(shape, transposed):
        zeros = {"zeros": True} if form.grid == "asymmetric" else {}
        layout = {"kind": "rounded", "in": shape[1], "bits": form.bits, "group": form.group, **zeros}
        of_dense = SimpleNamespace(get_submodule=lambda name: dense)
        checkpoint = SimpleNamespace(layouts={"m": layout}, directory="c", dense=of_dense)
        try:
            scheme = packed.scheme_of(checkpoint, "m")
            reads = packed.not_in_vllm({"m": scheme}, []) is None
        except InputError:
            reads = False
        assert structure.runs([own], size, "compressed-tensors") == reads, (form, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gguf_runs_the_forms_that_the_export_stores_exactly(shape):
    for form, own, size, structure in rounded_forms(shape):
        module = RoundedLinear(shape[1], shape[0], form.bits, form.group, False, form.grid == "asymmetric")
        ends, groups = torch.tensor([-(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1]), module.scale.shape[1]
        module.steps.copy_(packed_codes(ends.repeat(shape[0], shape[1])[:, : shape[1]], form.bits))
        if module.zeros:
            module.zero.copy_(packed_codes(ends.repeat_interleave(shape[0] // 2)[:, None].expand(-1, groups), form.bits))
        module.scale.fill_(1)
        exact = grid_of(module) is not None and shape[1] % 32 == 0
        assert structure.runs([own], size, "gguf") == exact, (form, shape)


def test_gguf_runs_whole_blocks_of_32_and_smaller_ffns():
    found = {(form.group, form.bits, form.grid) for form, own, size, s in rounded_forms((64, 256)) if s.runs([own], size, "gguf")}
    assert {group for group, _, _ in found} == {32, 64, 96, 128, 256}, "groups of 8 are no blocks; the last of 96 is one of 64"
    assert {bits for _, bits, grid in found if grid == "asymmetric"} == {2, 4}, "with zero points 8 bits would take 9"
    ffn = [matrix((48, 32), "gate_proj"), matrix((48, 32), "up_proj"), matrix((32, 48), "down_proj")]
    assert STRUCTURES.build({"kind": "neuron_slice"}).runs(ffn, 7, "gguf")
    for kind in ("low_rank", "gauge_fixed", "affine_block"):
        assert not STRUCTURES.build({"kind": kind}).runs(ffn, 7, "gguf")


def test_every_structure_names_runtimes_that_exist_and_all_run_anywhere():
    for kind, cls in STRUCTURES.items():
        assert set(cls.engines) <= set(RUNTIMES) - {"any"}, kind
    for kind in ("affine_block", "split_affine"):
        changed = STRUCTURES.build({"kind": kind})
        assert changed.runs([matrix((48, 32), "up_proj"), matrix((32, 48), "down_proj")], 1, "vllm")
        assert not changed.runs([matrix((96, 32), "gate_up_proj"), matrix((32, 48), "down_proj")], 1, "vllm")
        assert not changed.runs([matrix((48, 32), "up_proj"), matrix((32, 48), "down_proj")], 1, "gguf")
    parts = {"attention": {"kind": "rounded"}, "ffn": {"kind": "low_rank"}}
    by_target = STRUCTURES.build({"kind": "by_target", "parts": parts})
    assert "gguf" in by_target.engines
    assert by_target.runs([matrix((64, 64))], 1, "gguf")
    assert not by_target.runs([matrix((64, 64), "up_proj")], 1, "gguf")


def rounded_groups(count, group=(32, 128)):
    """Groups of 96 inputs: those of 32 divide the row, those of 128 are the row."""
    draws, structure = np.random.default_rng(0), STRUCTURES.build(FORMS | {"bits": [2, 3, 4, 5, 6, 8], "group": list(group)})
    groups = []
    for i in range(count):
        own = matrix((64, 160), layer=i)
        forms = structure.forms(64, 160)
        loss = [draws.uniform(1, 2) * 4.0 ** -(form.row_bytes(160) / 20) for form in forms]
        dense = 64 * 160 * 2
        groups.append(Group(own.name, [own], structure, 2, 0, dense, [0] * (1 + len(forms)), [9.0, *loss], [9.0, *loss]))
    return groups


@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name != "any"])
def test_the_programme_chooses_among_what_runs_and_is_the_best_of_it(runtime):
    """Brute force over two matrices, and only sizes that run among many."""
    groups = rounded_groups(2)
    ilp = ALLOCATIONS.build({"kind": "ilp", "sizes": 64, "gap": 0.0, "runtime": runtime})
    choice = ilp.allocate(groups, 0.4)
    tables = []
    for g in groups:
        sizes = [s for s in range(1, g.largest + 1) if g.structure.runs(g.matrices, s, runtime)]
        tables.append([(g.bytes(s), g.predicted[s]) for s in sizes] + [(g.dense, 0.0)])
    allowed = 0.4 * sum(g.dense for g in groups)
    best = min(a[1] + b[1] for a, b in product(*tables) if a[0] + b[0] <= allowed)
    assert choice.facts["value"] == pytest.approx(best)
    many = rounded_groups(20)
    sizes = allocate(many, budget(keep_bytes=0.3, nearest=True, allocation={"kind": "ilp", "runtime": runtime})).sizes
    for g in many:
        assert sizes[g.name] is None or g.structure.runs(g.matrices, sizes[g.name], runtime)
    free = allocate(many, budget(keep_bytes=0.3, allocation={"kind": "ilp"})).sizes
    loss = [sum(g.predicted[found[g.name]] for g in many) for found in (free, sizes)]
    assert loss[0] <= loss[1] * (1 + 1e-6), "a restriction never lowers the loss"
    assert stored_bytes(many, sizes) <= 0.3 * sum(g.dense for g in many)


def test_sizes_that_are_left_out_are_not_reached_in_single_steps():
    """`spend` goes from the smallest size to the next that may be chosen."""
    from winnow.allocation.base import spend

    (g,) = rounded_groups(1)
    g = replace(g, left_out=frozenset(range(2, 5)))
    sizes = {g.name: 1}
    spend([g], sizes, g.bytes(5), {g.name: g.predicted})
    assert sizes == {g.name: 5}


def test_a_matrix_without_a_size_is_refused_by_name():
    with pytest.raises(
        InputError, match=r"no size of layers\.0\.q_proj \(64 x 160\) is left with `runtime: gguf`, which runs smaller FFNs"
    ):
        restricted(rounded_groups(1, group=(48,)), "gguf")
    with pytest.raises(InputError, match=r"keep_bytes 0\.08 with `runtime: torch` cannot be met within 0\.5%"):
        allocate(rounded_groups(3), budget(keep_bytes=0.08, allocation={"kind": "ilp", "runtime": "torch"}))
    structure = STRUCTURES.build(FORMS | {"group": 64})
    matrices = [matrix((64, 128)), matrix((64, 176), "o_proj")]  # 32 does not divide 176
    check_sizes(structure, matrices, ["q_proj"], "gguf")
    with pytest.raises(InputError, match=r"remove o_proj from the budget's targets"):
        check_sizes(structure, matrices, ["attention"], "gguf")


def plan_of(runtime, **structure):
    config = plain()
    preset = {"structure": structure, "metric": {"kind": "gram"}, "allocation": {"kind": "ilp", "runtime": runtime}}
    config["methods"] = {"own": preset}
    config["budgets"] = {"all": {"targets": ["ffn", "attention"], "keep_bytes": 0.3}}
    config["experiments"]["demo"].update(methods=["own"], budgets=["all"])
    return Plan(load(config), ".")


def test_a_plan_refuses_before_any_job_what_no_size_is_left_for():
    check_runtimes(plan_of("gguf", kind="rounded", bits=[2, 4], group=32))
    check_runtimes(plan_of("torch", kind="low_rank"))
    check_runtimes(plan_of("gguf", kind="rounded", bits=[2, 4], group=128))  # the last of 352 inputs are 96
    with pytest.raises(InputError, match=r"method 'own', budget 'all', model 'demo': no size of model\.layers\.0\.self_attn"):
        check_runtimes(plan_of("gguf", kind="rounded", bits=[2, 4], group=48))
    with pytest.raises(InputError, match=r"no size of model\.layers\.0\.self_attn\.q_proj \(128 x 128\)"):
        check_runtimes(plan_of("gguf", kind="low_rank"))


def test_the_default_moves_no_label():
    config = plain()
    before = Plan(load(config), ".").labels
    config["methods"] |= {"one": {"structure": {"kind": "low_rank"}, "metric": {"kind": "gram"}, "allocation": {"kind": "ilp"}}}
    spelled = {**config["methods"]["one"], "allocation": {"kind": "ilp", "runtime": "any"}}
    config["methods"]["two"] = spelled
    after = Plan(load(config), ".").labels
    assert after["methods"]["one"].removeprefix("one") == after["methods"]["two"].removeprefix("two")
    assert before["methods"].items() <= after["methods"].items()
