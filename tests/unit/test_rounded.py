"""The structure `rounded`: its grid, what is stored of it, bits as sizes, and what a cast, an export or a recovery leaves."""

import hashlib
import json
from itertools import pairwise, product

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import pico
from tests.unit.test_checkpoint import build, logits
from tests.unit.test_recovery import KINDS, files_of, run
from tests.unit.worlds import World
from winnow.allocation.groups import TOLERANCE, Group, allocate
from winnow.checkpoint.export import export_dense
from winnow.checkpoint.loading import load_model
from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, Bundle
from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix
from winnow.numerics.grids import Form, scaled
from winnow.numerics.kernels import FEW
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import in_float16, multiplied, packed, scales_of, steps_of, unpacked
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.structures.base import STRUCTURES, Problem

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
ALL = ["ffn", "attention"]


@pytest.mark.parametrize(("bits", "group", "size"), [*product((2, 3, 4, 8), (4, 32, 70), (1e-7, 1e-4, 1.0, 1e4))])
def test_numbers_move_half_a_step_of_a_stored_scale_at_most(bits, group, size):
    """Also where float16 has few digits left for a scale, and where all numbers of a group are 0."""
    w = size * torch.randn(6, 70, generator=torch.Generator().manual_seed(bits + group), dtype=torch.float64)
    w[2] = 0
    exact = scales_of(w, bits, group)
    scales = in_float16(exact)
    steps = steps_of(w, scales, bits, group)
    assert (scales.double() >= exact).all()
    assert ((scales.double() - exact) <= torch.clamp(exact * 2.0**-10, min=2.0**-24)).all(), "the next number of float16"
    assert float(steps.abs().max()) <= 2 ** (bits - 1) - 1
    half = scales.double().repeat_interleave(group, 1)[:, :70] / 2
    error = (multiplied(steps, scales.double(), group) - w).abs()
    assert (error <= half * (1 + 1e-9)).all()
    assert (error > 0.8 * half).any(), "nothing was rounded"
    assert torch.equal(multiplied(steps.float(), scales.float(), group).double(), multiplied(steps, scales.double(), group))


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(ValueError, match=r"a scale of 7\.87e\+04 is too large for float16"):
        in_float16(scales_of(torch.full((1, 4), 1e7), 8, 4))


@pytest.mark.parametrize(("bits", "columns"), [*product(range(2, 9), (1, 2, 3, 7, 8, 9, 16, 29))])
def test_packed_and_back(bits, columns):
    """A row's bits one after the other, in as many bytes as they need; every number of the grid, at every place in a byte."""
    grid = torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))
    steps = grid.repeat(3 * columns)[: 3 * columns].reshape(3, columns)
    stored = packed(steps.double(), bits)
    assert stored.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert stored.shape == (3, (columns * bits + 7) // 8)
    assert torch.equal(unpacked(stored, columns, bits), steps.to(torch.int8))
    if bits < 8:
        for row, own in zip(steps.tolist(), stored.tolist(), strict=True):
            number = sum(byte << 8 * place for place, byte in enumerate(own))
            assert [(number >> bits * place) % 2**bits - 2 ** (bits - 1) for place in range(columns)] == row


@pytest.mark.parametrize(("bits", "group"), [*product((2, 3, 4, 8), (4, 32, 70))])
def test_a_searched_scale_loses_no_more_and_with_few_bits_less(bits, group):
    generator = torch.Generator().manual_seed(bits + group)
    w = torch.randn(6, 70, generator=generator, dtype=torch.float64)
    w[2] = 0
    columns = torch.rand(70, generator=generator, dtype=torch.float64) ** 4
    lost = []
    for scales in (in_float16(scales_of(w, bits, group)), scaled(w, Form(bits, "symmetric", group), "searched", columns)[0]):
        steps = steps_of(w, scales, bits, group)
        assert float(steps.abs().max()) <= 2 ** (bits - 1) - 1
        parts = ((multiplied(steps, scales.double(), group) - w).square() * columns).split(group, dim=1)
        lost.append(torch.stack([part.sum(1) for part in parts], dim=1))
    assert (lost[1] <= lost[0]).all()
    assert float(lost[1].sum()) < {2: 0.8, 3: 0.9, 4: 1.0, 8: 1.0}[bits] * float(lost[0].sum())


@pytest.mark.parametrize(("family", "bits", "group"), [*product(("llama", "gpt2"), (8, 4, 3), (5, None))])
def test_files_hold_the_integers_of_the_dense_matrix(family, bits, group, tmp_path):
    """Also of a matrix that is stored transposed, and in the export."""
    model = pico(family)
    model.save_pretrained(tmp_path / "dense")
    folder = build(tmp_path / "dense", tmp_path / "work", ALL, 0.6, "rounded", bits=[bits], group=group)
    export_dense(folder, tmp_path / "export", {})
    dense, stored, export = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "work/checkpoint", "export"))
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    bytes_by_hand = 0
    for module in layers:
        whole, written = dense[f"{module}.weight"], export[f"{module}.weight"]
        weight, written = (whole.T, written.T) if family == "gpt2" else (whole, written)
        (m, n), width = weight.shape, group or weight.shape[1]
        scales = in_float16(scales_of(weight, bits, width))
        steps = steps_of(weight, scales, bits, width)
        assert torch.equal(stored[f"{module}.scale"].view(torch.float16), scales)
        own = stored[f"{module}.steps"]
        assert own.dtype == (torch.int8 if bits == 8 else torch.uint8)
        assert torch.equal(unpacked(own, n, bits).double(), steps)
        assert torch.equal(written, multiplied(steps, scales.double(), width).float())
        bytes_by_hand += m * ((n * bits + 7) // 8 + 2 * ((n + width - 1) // width)) + 4 * m * (f"{module}.bias" in dense)
    assert json.loads((folder / MANIFEST).read_text())["stored_bytes"] == bytes_by_hand


def test_no_cast_and_no_copy_changes_what_is_stored(saved_model, tmp_path):
    folder = build(saved_model, tmp_path / "work", ALL, 0.6, "rounded", bits=[5])
    model, stored = load_model(folder, "float32", "cpu"), load_file(folder / "model.safetensors")
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) and again[name].dtype == stored[name].dtype for name in stored)
    rounded = {name: module for name, module in model.named_modules() if isinstance(module, RoundedLinear)}
    assert rounded
    model.to(torch.bfloat16)
    logits(model)
    name, module = next(iter(rounded.items()))
    exact = module.double()(torch.eye(module.in_features, dtype=torch.float64)) - (0 if module.bias is None else module.bias)
    many = torch.eye(module.in_features, dtype=torch.bfloat16).repeat(FEW, 1)  # more than the kernel takes
    plain = module.bfloat16()(many)[: module.in_features]
    assert torch.equal(plain, (exact if module.bias is None else exact.bfloat16() + module.bias).bfloat16()), "rounded once"
    for name, module in rounded.items():
        assert torch.equal(module.steps, stored[f"{name}.steps"])
        assert torch.equal(module.scale, stored[f"{name}.scale"])
    assert torch.equal(logits(load_model(tmp_path / "again", "float32", "cpu")), before)


def test_a_checkpoint_of_16_bits_keeps_its_scales(tmp_path):
    """bfloat16 has fewer digits than a scale."""
    pico("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    folder = build(tmp_path / "dense", tmp_path / "work", ALL, 0.6, "rounded", bits=[8])
    stored = load_file(folder / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        module = load_model(folder, dtype, "cpu").get_submodule("model.layers.0.mlp.up_proj")
        assert torch.equal(module.scale, stored["model.layers.0.mlp.up_proj.scale"])


def test_more_bits_lose_less_and_eight_hardly_anything(saved_llama, tmp_path):
    dense = logits(load_model(saved_llama, "float32", "cpu"))
    forms = {(bits, group): tmp_path / f"{bits}-{group}" for bits in (8, 4) for group in (32, None)}
    lost = {}
    for (bits, group), work in forms.items():
        model = load_model(build(saved_llama, work, ALL, 0.6, "rounded", bits=[bits], group=group), "float32", "cpu")
        lost[bits, group] = float((logits(model) - dense).norm() / dense.norm())
    assert lost[8, 32] < 0.01
    assert 10 * lost[8, 32] < lost[4, 32] < lost[4, None]
    assert lost[8, 32] < lost[8, None]


def group_of(structure, layer: int = 0, losses=(1.0, 0.1)) -> Group:
    matrix = Matrix(layer, "up_proj", f"layers.{layer}.up_proj", "ffn_input", (64, 96), False, False)
    numbers = [0] * (structure.limit([matrix]) + 1)
    return Group(matrix.name, [matrix], structure, 4, 0, 4 * 64 * 96, numbers, [*losses], [*losses])


def test_other_sizes_are_refused_in_one_line():
    group = group_of(STRUCTURES.build({"kind": "rounded"}))
    budget = {"keep_bytes": 0.5, "rank": None, "rank_fraction": None, "allocation": {"kind": "uniform"}}
    one = r"layers\.0\.up_proj \(64 x 96\) has only one size, `rank_fraction: 1`"
    for keep in (0.2, 0.5):
        line = rf"^keep_bytes {keep} cannot be met within 0\.5%: the nearest is 0\.2656; {one}, or set `nearest: true` in"
        with pytest.raises(InputError, match=line):
            allocate([group], {**budget, "keep_bytes": keep})
        assert allocate([group], {**budget, "keep_bytes": keep, "nearest": True}).sizes == {group.name: 1}
    with pytest.raises(InputError, match=f"^rank 2 is not possible: {one}$"):
        allocate([group], {**budget, "keep_bytes": None, "rank": 2})
    for asked in ({"rank": 1}, {"rank_fraction": 1.0}, {"keep_bytes": 0.27}):  # the last: at its own bytes, beside other methods
        assert allocate([group], {**budget, "keep_bytes": None, **asked}).sizes == {group.name: 1}


EVERY = [2, 3, 4, 5, 6, 7, 8]


def test_a_size_is_a_number_of_bits():
    group, short = (
        group_of(STRUCTURES.build({"kind": "rounded", "bits": EVERY})),
        "layers\\.0\\.up_proj \\(64 x 96\\) has 7 sizes",
    )
    assert [group.bytes(size) for size in range(1, 8)] == [64 * (12 * bits + 2 * 3) for bits in EVERY]
    budget = {"keep_bytes": None, "rank": None, "rank_fraction": None, "allocation": {"kind": "uniform"}}
    assert allocate([group], budget | {"rank": 3}).sizes == {group.name: 3}
    assert allocate([group], budget | {"rank_fraction": 1.0}).sizes == {group.name: 7}
    assert allocate([group], budget | {"keep_bytes": group.bytes(4) / group.dense}).sizes == {group.name: 4}
    with pytest.raises(InputError, match=f"^rank 8 is not possible: {short}, `rank: 1` to `rank: 7`$"):
        allocate([group], budget | {"rank": 8})
    with pytest.raises(InputError, match=rf"^keep_bytes 0\.2 cannot be met within 0\.5%: the nearest is 0\.1719; {short}"):
        allocate([group], budget | {"keep_bytes": 0.2})


@pytest.mark.parametrize("kind", ["ilp", "greedy"])
def test_bits_are_spread_over_matrices_by_what_they_lose(kind):
    """`ilp` is the best of all choices; `greedy` gives no fewer bits to a matrix that loses more."""
    structure, bits = STRUCTURES.build({"kind": "rounded", "bits": [3, 4, 6]}), range(1, 4)
    groups = [group_of(structure, layer, [9.0 * scale, *(scale * 4.0**-b for b in (3, 4, 6))])
              for layer, scale in enumerate([1.0, 300.0, 0.02, 8.0])]  # fmt: skip
    keep = sum(g.bytes(2) for g in groups) / sum(g.dense for g in groups)
    allowed = keep * sum(g.dense for g in groups)
    spread = {"kind": kind, "objective": "predicted", "leave_dense": False} | ({"gap": 0.0} if kind == "ilp" else {})
    sizes = allocate(groups, {"keep_bytes": keep, "allocation": spread}).sizes
    order = [sizes[groups[index].name] for index in (2, 0, 3, 1)]
    assert len(set(order)) > 1
    assert all(a <= b for a, b in pairwise(order))
    every = [c for c in product(bits, repeat=4) if sum(g.bytes(s) for g, s in zip(groups, c, strict=True)) <= allowed]
    best = min(sum(g.predicted[s] for g, s in zip(groups, c, strict=True)) for c in every)
    if kind == "ilp":
        assert sum(g.predicted[sizes[g.name]] for g in groups) == pytest.approx(best, rel=1e-9)


def test_bytes_are_met_where_the_least_loss_would_leave_many():
    """Between 8 bits and dense there is nothing: then the best of all choices within the tolerance is taken."""
    losses = [1.0, *(4.0**-bits for bits in EVERY)]
    groups = [group_of(STRUCTURES.build({"kind": "rounded", "bits": EVERY}), layer, losses) for layer in range(4)]
    total = sum(g.dense for g in groups)
    ways = [(sum(g.bytes(s) for g, s in zip(groups, c, strict=True)), sum(losses[s] if s else 0.0 for s in c))
            for c in product([None, *range(1, 8)], repeat=4)]  # fmt: skip
    for keep in (0.594, 0.69, 0.9):
        within = [loss for stored, loss in ways if (keep - TOLERANCE) * total <= stored <= keep * total]
        spread = {"kind": "ilp", "gap": 0.0}
        if not within:
            with pytest.raises(InputError, match=rf"keep_bytes {keep} cannot be met within 0\.5%: the nearest is"):
                allocate(groups, {"keep_bytes": keep, "allocation": spread})
            continue
        sizes = allocate(groups, {"keep_bytes": keep, "allocation": spread}).sizes
        assert sum(losses[s] if s else 0.0 for s in sizes.values()) == pytest.approx(min(within), rel=1e-9)
    below = [loss for stored, loss in ways if stored <= 0.594 * total]
    assert min(below) < min(loss for stored, loss in ways if (0.594 - TOLERANCE) * total <= stored <= 0.594 * total)


@pytest.mark.parametrize("scales", ["largest", "searched"])
def test_predicted_losses_are_those_written_out_for_all_bits(scales):
    world = World("gram", 10, 29, seed=3)
    structure = STRUCTURES.build({"kind": "rounded", "bits": EVERY, "group": 8, "scales": scales})
    for matrix in world.matrices[:6]:
        problem = world.problem(structure, [matrix])
        fit = structure.fit(problem, len(EVERY))
        x, g = world.inputs[matrix.layer, matrix.site], world.gradients[matrix.name]
        problem.outputs[matrix.name]["gradient_gram"] = g @ g.T / 200
        predicted, weight = structure.predicted(problem, fit.tensors), world.weights[matrix.name]
        for size, bits in enumerate([None, *EVERY]):
            kept = torch.zeros_like(weight)
            if bits:
                part = structure.stored([matrix], fit.tensors, size)[matrix.module]
                steps = unpacked(part.tensors["steps"], weight.shape[1], bits).double()
                wide = part.tensors["scale"].view(torch.float16).double().repeat_interleave(8, 1)
                kept = steps * wide[:, : weight.shape[1]]
            by_hand = float((g.T @ (weight - kept) @ x).square().sum()) / 2 / 200**2
            assert float(predicted[size]) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([1], "bits.*greater than or equal to 2"),
        ([4, 9], "bits.*less than or equal to 8"),
        ([4, 4, 8], r"without duplicates: \[4, 8\]"),
        ([8, 4], r"in ascending order without duplicates: \[4, 8\]"),
        ([], "bits.*at least 1"),
    ],
)
def test_bits_that_are_no_sizes_are_refused(bits, message):
    content = default()
    content["methods"]["mine"] = {"structure": {"kind": "rounded", "bits": bits}, "metric": {"kind": "weights"}}
    with pytest.raises(InputError, match=message):
        load(content)


def test_fixed_integers_leave_nothing_to_train_but_norms(saved_llama, tmp_path):
    def config(method: str, **recovery) -> dict:
        content = default()
        content["recoveries"]["mine"] = {"kind": "refine", "rounded": "fixed"} | recovery
        parts = {"qkv": {"kind": "rounded"}, "ffn": {"kind": "low_rank"}}
        content["methods"]["half"] = {"structure": {"kind": "by_target", "parts": parts}, "metric": {"kind": "weights"}}
        content["experiments"]["demo"] |= {"methods": [method], "recoveries": ["none", "mine"]}
        return content

    nothing = "'mine' has nothing to change in method 'rounded_4bit': rounded stores only codes and scales"
    for kind in ("refine", "distill", "sequential"):
        with pytest.raises(InputError, match=nothing):
            load(config("rounded_4bit", kind=kind))
    load(config("rounded_4bit", kind="sequential", rounded="codes"))
    load(config("rounded_4bit", rounded="scales"))
    load(config("rounded_4bit", norms=True))
    load(config("half"))
    checkpoint = Bundle(build(saved_llama, tmp_path / "work", ALL, 0.6, "rounded", bits=[4]) / MANIFEST)
    before = load_model(checkpoint.directory, "float32", "cpu").state_dict()
    for name in ("refine", "distill"):
        task, _ = run(files_of(saved_llama, tmp_path), checkpoint, {**KINDS[name], "norms": True, "rounded": "fixed"})
        changed = {key for key, value in task.model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed
        assert all("norm" in key for key in changed)
    for name in ("sequential", "refine", "distill"):  # an allocation of `mixed` may choose nothing else
        task, _ = run(files_of(saved_llama, tmp_path), checkpoint, KINDS[name] | {"rounded": "fixed"})
        assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


FORMER = {  # digests of layout, steps and scales, by size, as of the commit before there were other grids
    ("weights", "largest", (8,)): ["91675a19d8dd"],
    ("weights", "largest", (4,)): ["1fc623b055ae"],
    ("two_sided", "searched", (3, 4, 5, 6, 8)): ["3917b3c4c8a2", "66656db4ae65", "96f0a9c26c54", "f1332a748ad6", "36ac24c800ff"],
}


@pytest.mark.parametrize("how", FORMER, ids=str)
def test_what_former_options_store_is_what_it_was(how):
    generator = torch.Generator().manual_seed(0)

    def random(maker, *shape):
        return maker(*shape, generator=generator, dtype=torch.float64)

    w = random(torch.randn, 24, 70) * random(torch.rand, 24, 1)
    w[3] = 0
    x = random(torch.randn, 70, 300) * random(torch.rand, 70, 1)
    x[5] = 0
    g = random(torch.randn, 24, 300)
    matrix, (metric, scales, bits) = Matrix(0, "up_proj", "l.up_proj", "ffn_input", (24, 70), False, False), how
    structure = STRUCTURES.build({"kind": "rounded", "bits": [*bits], "scales": scales})
    sites, outputs = ({matrix.name: {name: t @ t.T / 300}} for name, t in (("gram", x), ("gradient_gram", g)))
    problem = Problem([matrix], {matrix.name: w}, sites, METRICS.build({"kind": metric}), outputs=outputs)
    fit, found = structure.fit(problem, len(bits)), []
    for size in range(1, len(fit.error)):
        part = structure.stored([matrix], fit.tensors, size)["l.up_proj"]
        digest = hashlib.sha256(repr(part.layout).encode())
        for name in ("steps", "scale"):
            digest.update(part.tensors[name].contiguous().numpy().tobytes())
        found.append(digest.hexdigest()[:12])
    assert found == FORMER[how]


FORMS = {
    "full": {"bits": [3], "group": 5, "grids": ["full"]},
    "asymmetric": {"bits": [3], "group": 5, "grids": ["asymmetric"], "scales": "unbiased"},
    "bytes": {"bits": [8], "group": None, "grids": ["asymmetric"]},
    "several": {"bits": [2, 3, 8], "group": [5, 32, None], "grids": ["full", "asymmetric"], "rounding": "feedback"},
}


@pytest.mark.parametrize(("family", "form"), [("llama", "several"), ("llama", "full"), ("gpt2", "asymmetric"), ("gpt2", "bytes")])
def test_every_form_is_stored_in_the_bytes_it_says(family, form, tmp_path):
    """Files, reload and export; zero points are stored where the grid has them, and make it format 2."""
    pico(family).save_pretrained(tmp_path / "dense")
    options = FORMS[form]
    structure, size = STRUCTURES.build({"kind": "rounded", **options}), {"several": 7}.get(form, 1)
    folder = build(tmp_path / "dense", tmp_path / "work", ALL, 0.6, "rounded", metric="gram", **options)
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    total = 0
    for module, layout in config["layers"].items():
        own = structure.forms(layout["out"], layout["in"])[size - 1]
        tensors = [stored[f"{module}.{name}"] for name in ("steps", "scale", *(["zero"] if "zeros" in layout else []))]
        assert sum(t.nbytes for t in tensors) == layout["out"] * own.row_bytes(layout["in"])
        assert ("zeros" in layout) == (own.grid == "asymmetric")
        total += sum(t.nbytes for t in tensors) + stored.get(f"{module}.bias", torch.empty(0)).nbytes
    assert json.loads((folder / MANIFEST).read_text())["stored_bytes"] == total
    zeros = any("zeros" in layout for layout in config["layers"].values())
    assert config["format_version"] == (2 if zeros else 1)
    assert f"checkpoint format {config['format_version']}" in (folder / "README.md").read_text()
    loaded = load_model(folder, "float32", "cpu")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", "float32", "cpu")), logits(loaded))
    export_dense(folder, tmp_path / "export", {})
    torch.testing.assert_close(logits(load_model(tmp_path / "export", "float32", "cpu")), logits(loaded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": ["full", "full"]}, "grids.*remove the duplicates"),
        ({"group": [32, None, 32]}, "group.*remove the duplicates"),
        ({"rotations": ["both", "both"]}, "rotations.*remove the duplicates"),
        ({"rotations": ["outputs"]}, "rotations.*'none', 'inputs' or 'both'"),
        ({"group": []}, "group.*a list must not be empty"),
        ({"group": 2}, "group.*a group must have at least 4 inputs, or be null"),
        ({"group": [32, 2]}, "group.*a group must have at least 4 inputs, or be null"),
        ({"grids": ["round"]}, "grids.*'symmetric', 'full' or 'asymmetric'"),
    ],
)
def test_forms_that_are_none_are_refused(options, message):
    content = default()
    content["methods"]["mine"] = {"structure": {"kind": "rounded", **options}, "metric": {"kind": "weights"}}
    with pytest.raises(InputError, match=message):
        load(content)
