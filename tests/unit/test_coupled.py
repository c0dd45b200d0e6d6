"""`coupled`: exact identities of the descent, what is stored, and a checkpoint that shares tensors between layers."""

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import VOCABULARY
from winnow.allocation.groups import allocate, chosen_groups, summarize
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.writer import compressed, recipe_of, write_checkpoint
from winnow.factors.fit import fit_groups, storable
from winnow.io.artifacts import Bundle, write_json, write_manifest, write_tensors
from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.numerics.coupling import Coupling, anchors_of, descend, leading, numbering, solve
from winnow.numerics.linalg import leading_directions
from winnow.planning.config import Method
from winnow.structures.base import STRUCTURES, Problem

LAYERS, SIZE = 4, 4
TYINGS = ("free", "grouped", "tied")
TWO = [(t, s) for t in TYINGS for s in ("chained", "separate")]
FORMS = [(t, s, "two") for t, s in TWO] + [(t, "separate", "one") for t in TYINGS]
ALL = pytest.mark.parametrize(("tying", "sections", "sides"), FORMS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family(shape=(12, 12), metric="weights", seed=0, rank=None) -> Problem:
    """One role in four layers; inputs of mixed scale, of `rank` dimensions if given."""
    group = [Matrix(i, "o_proj", f"layers.{i}.o_proj", "attention_output", shape, False, False) for i in range(LAYERS)]
    weights, sites = {}, {}
    for m in group:
        weights[m.name] = randn(*shape, seed=100 * seed + m.layer)
        x = torch.logspace(-1, 1, shape[1], dtype=torch.float64)[:, None] * randn(shape[1], 60, seed=100 * seed + 50 + m.layer)
        if rank:
            x = randn(shape[1], rank, seed=7) @ x[:rank]
        gram = x @ x.T / x.shape[1]
        sites[m.name] = {"gram": gram, "rms": gram.diagonal().sqrt()}
    return Problem(group, weights, sites, METRICS.build({"kind": metric}))


def coupled(**options):
    return STRUCTURES.build({"kind": "coupled", **options})


def fitted(structure, problem):
    return structure.fit(problem, structure.limit(problem.group))


def rebuild(structure, group, tensors, size) -> tuple[dict[str, torch.Tensor], int]:
    """({matrix name: the map of its module}, numbers stored), shared tensors in place."""
    parts, model = structure.stored(group, tensors, size), nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in group)
    for m, layer in zip(group, model.layers, strict=True):
        layer.o_proj = structure.module(parts[m.module].layout, nn.Linear(1, 1, bias=False)).double()
    tied = {k: v for m in group for k, v in structure.share(model, m.module, parts[m.module].layout).items()}
    state = {f"{module}.{name}": t for module, part in parts.items() for name, t in part.tensors.items()}
    model.load_state_dict({**state, **{k: state[v] for k, v in tied.items()}}, strict=True)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state.values()), "one parameter per tensor"
    with torch.no_grad():
        maps = {m.name: model.get_submodule(m.module)(torch.eye(m.shape[1], dtype=torch.float64)).T for m in group}
    return maps, sum(t.numel() for t in state.values())


def projector(section):
    return section @ section.T


def solved(structure, fit, size=SIZE):
    return structure._solved(fit.tensors, size)


def anchors(structure, fit, size=SIZE):
    coupling = Coupling(fit.tensors["maps"], fit.tensors["inputs"].tolist(), fit.tensors["outputs"].tolist())
    return coupling, anchors_of(coupling, fit.tensors["lefts"][:, :, :size], structure.options.anchor_side)


@ALL
@pytest.mark.parametrize("shape", [(12, 12), (10, 16), (16, 10)])
@pytest.mark.parametrize("metric", ["weights", "second_moment", "gram"])
def test_what_is_stored_is_what_is_counted_and_has_the_reported_error(tying, sections, sides, shape, metric):
    structure, problem = coupled(tying=tying, sections=sections, sides=sides, sweeps=5), family(shape, metric)
    if sections == "chained" and (metric != "weights" or shape[0] != shape[1]):
        with pytest.raises(ValueError, match="chained sections need square matrices"):
            fitted(structure, problem)
        structure = coupled(tying=tying, sections="auto", sides=sides, sweeps=5)
    fit, again = fitted(structure, problem), fitted(structure, problem)
    assert (fit.error.diff() <= 1e-9 * fit.error[0]).all()
    for size in (1, SIZE, min(shape)):
        maps, numbers = rebuild(structure, problem.group, fit.tensors, size)
        assert numbers == structure.numbers(problem.group, size, fit.tensors)
        report = structure.report(problem.group, fit.tensors, size)
        lost = whole = 0.0
        for m in problem.group:
            same = problem.group if tying == "tied" else [m]
            if tying == "grouped":
                same = [o for o in problem.group if o.layer // 2 == m.layer // 2]
            columns = problem.columns(same)
            columns = columns if columns.dim() == 2 else torch.diag(columns)
            rest = problem.weights[m.name] - maps[m.name]
            own = float(torch.trace(rest @ columns @ rest.T))
            tail = leading_directions(problem.weights[m.name], columns).error
            assert own >= float(tail[size]) - 1e-7 * float(tail[0]), "no map of that rank loses less"
            lost, whole = lost + own, whole + float(tail[0])
        assert lost / whole == pytest.approx(report["error"], rel=1e-6, abs=1e-8)
        assert report["lower_bound"] - 1e-9 <= report["error"] <= float(fit.error[size] / fit.error[0]) + 1e-9
        json.dumps(report, allow_nan=False)
        one, other = structure.stored(problem.group, fit.tensors, size), structure.stored(problem.group, again.tensors, size)
        for module, part in one.items():
            assert part.layout == other[module].layout
            assert all(torch.equal(t, other[module].tensors[name]) for name, t in part.tensors.items())


@ALL
@pytest.mark.parametrize("metric", ["weights", "gram"])
@pytest.mark.parametrize(("shape", "rank"), [((12, 12), None), ((12, 12), 5), ((10, 16), None), ((10, 16), 6), ((16, 10), 6)])
def test_full_size_gives_the_weights_back(tying, sections, sides, metric, shape, rank):
    """Whole sections are whole spaces, so square matrices come back always, even from a singular metric. In rectangular ones
    the smaller side is whole; the other holds the rows (columns) of one matrix, so those come back if its section is its own."""
    if sections == "chained":
        sections = "auto"
    structure, problem = coupled(tying=tying, sections=sections, sides=sides), family(shape, metric, rank=rank)
    fit = fitted(structure, problem)
    maps, _ = rebuild(structure, problem.group, fit.tensors, min(shape))
    exact = shape[0] == shape[1] or tying == "free" or (shape[1] < shape[0] and sides == "one")  # then the only section is whole
    if exact:
        assert float(fit.error[-1]) < 1e-9 * float(fit.error[0])
        for m in problem.group:
            torch.testing.assert_close(maps[m.name], problem.weights[m.name], atol=1e-9, rtol=1e-9)
    elif rank is None:
        assert float(fit.error[-1]) > 1e-4 * float(fit.error[0]), "one section cannot hold the rows of several matrices"


@ALL
@pytest.mark.parametrize("anchor", ["metric", "plain", "whitened"])
def test_infinite_strength_gives_the_anchors_at_the_rate_of_one_over_lambda(tying, sections, sides, anchor):
    options = {"tying": tying, "sections": sections, "sides": sides, "anchor": anchor, "starts": 1, "sweeps": 2000}
    problem = family()
    structure = coupled(anchor_strength=float("inf"), **options)
    assert structure.options.model_dump(mode="json")["anchor_strength"] == "inf"
    assert STRUCTURES.build(json.loads(json.dumps(structure.options.model_dump(mode="json")))).options == structure.options
    fit = fitted(structure, problem)
    _, expected = anchors(structure, fit)
    _, found, report = solved(structure, fit)
    assert all(torch.equal(own, anchor) for own, anchor in zip(found, expected, strict=True))
    assert report["error"] == report["anchors_error"]
    distances = []
    for strength in (1e2, 1e3, 1e4):
        _, near, _ = solved(coupled(anchor_strength=strength, **options), fit)
        pairs = zip(near, expected, strict=True)
        distances.append(strength * sum(float((projector(a) - projector(b)).square().sum()) for a, b in pairs) ** 0.5)
    assert distances[2] == pytest.approx(distances[1], rel=0.1, abs=1e-6)
    assert distances[1] == pytest.approx(distances[0], rel=0.3, abs=1e-6)


def test_anchors_are_the_low_rank_maps_of_the_layers():
    """Separate sections at infinite strength store the rank-k map of each layer: SVD-LLM in the Gram metric, SVD in weights."""
    for shape in ((12, 12), (10, 16), (16, 10)):
        for metric in ("weights", "gram", "second_moment"):
            problem = family(shape, metric)
            structure = coupled(sections="separate", anchor_strength="inf")
            maps, _ = rebuild(structure, problem.group, fitted(structure, problem).tensors, SIZE)
            for m in problem.group:
                best = leading_directions(problem.weights[m.name], problem.columns([m]))
                expected = best.left[:, :SIZE] @ best.right[:SIZE]
                torch.testing.assert_close(maps[m.name], expected, atol=1e-7, rtol=1e-6)
    # Anchors from the Gram metric in the metric `weights`: the two-sided score of SVD-LLM's sections.
    problem = family()
    structure = coupled(sections="separate", anchor="whitened", anchor_strength="inf")
    assert structure.needs() == ("gram",)
    maps, _ = rebuild(structure, problem.group, fitted(structure, problem).tensors, SIZE)
    for m in problem.group:
        weight = problem.weights[m.name]
        best = leading_directions(weight, problem.sites[m.name]["gram"])
        u, _, vh = torch.linalg.svd(best.left[:, :SIZE] @ best.right[:SIZE])
        expected = projector(u[:, :SIZE]) @ weight @ projector(vh[:SIZE].T)
        torch.testing.assert_close(maps[m.name], expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_sides_of_anchors(side):
    structure, problem = coupled(anchor_side=side), family()
    coupling, found = anchors(structure, fitted(structure, problem))
    spaces = [torch.linalg.svd(a) for a in coupling.maps]
    for place, section in enumerate(found):
        read = [spaces[place].Vh[:SIZE].T] if place < LAYERS else []
        written = [spaces[place - 1].U[:, :SIZE]] if place else []
        chosen = {"input": read or written, "output": written or read, "both": read + written}[side]
        expected = leading(torch.cat(chosen, dim=1), SIZE)
        torch.testing.assert_close(projector(section), projector(expected))


@ALL
@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(12, 12), (10, 16)])
def test_energies_fall_in_every_start_and_more_starts_are_never_worse(tying, sections, sides, strength, shape):
    if sections == "chained":
        sections = "auto"
    best = []
    for starts in (1, 2, 5):
        structure = coupled(tying=tying, sections=sections, sides=sides, anchor_strength=strength, starts=starts)
        problem = family(shape)
        fit = fitted(structure, problem)
        report = structure.report(problem.group, fit.tensors, SIZE)
        assert len(report["starts"]) == (starts if sides == "two" else 1)
        for start in report["starts"]:
            assert all(after <= before for before, after in pairwise(start["energy"]))
            assert start["sweeps"] == len(start["energy"]) - 1
            assert start["converged"] or start["sweeps"] == 50
        best.append(report["starts"][report["winner"]]["energy"][-1])
        assert best[-1] == min(start["energy"][-1] for start in report["starts"])
        coupling, anchor = anchors(structure, fit)
        assert best[-1] <= coupling.energy(anchor, anchor, 0.0) * (1 + 1e-12), "the anchors are a start"
        if strength == 0:
            assert report["error"] <= report["anchors_error"] + 1e-12
    assert best[0] >= best[1] >= best[2]


def test_a_section_on_both_sides_of_a_map_needs_the_guarded_step():
    """The plain update of a fully tied chain can raise E: for a rotation by 90 degrees it swaps two lines for ever."""
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    for seed in range(20):
        maps = torch.stack([turn + 0.1 * randn(3, 3, seed=seed), -turn + 0.1 * randn(3, 3, seed=seed + 99)])
        coupling = Coupling(maps, *numbering(2, 3, chained=True))
        start = [torch.linalg.qr(randn(3, 1, seed=seed)).Q]
        sections, energies, _ = descend(coupling, start, start, 0.0, 3000, 1e-15)
        assert all(after <= before for before, after in pairwise(energies))
        seen = coupling.seen(0, sections)
        assert float(_commutator(seen @ seen.T, sections[0])) < 1e-4


def _commutator(gram, section):
    p = projector(section)
    return (gram @ p - p @ gram).norm() / gram.norm()


@pytest.mark.parametrize(("tying", "sections"), TWO)
def test_the_answer_is_a_fixed_point(tying, sections):
    """Every section spans eigenvectors of what it sees at the optimum (the leading ones, unless it is on both sides of a map)."""
    structure = coupled(tying=tying, sections=sections)
    coupling, anchor = anchors(structure, fitted(structure, family()))
    found, report = solve(coupling, anchor, 0.0, 2, 20000, 0, tolerance=1e-15)
    assert all(start["converged"] for start in report["starts"])
    for section, own in enumerate(found):
        seen = coupling.seen(section, found)
        assert float(_commutator(seen @ seen.T, own)) < 1e-5
        if not coupling.shift(section):
            torch.testing.assert_close(projector(leading(seen, SIZE)), projector(own), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sections", ["chained", "separate"])
@pytest.mark.parametrize("sides", ["two", "one"])
def test_freer_sections_lose_less(sections, sides):
    if sides == "one":
        sections = "separate"
    for seed in range(3):
        energies = []
        for tying in TYINGS:
            structure = coupled(tying=tying, sections=sections, sides=sides, starts=6, sweeps=500)
            problem = family(seed=seed)
            energies.append(structure.report(problem.group, fitted(structure, problem).tensors, SIZE)["error"])
        assert energies[0] <= energies[1] <= energies[2]


@ALL
def test_energy_sees_subspaces_only(tying, sections, sides):
    structure, problem = coupled(tying=tying, sections=sections, sides=sides), family()
    coupling, anchor = anchors(structure, fitted(structure, problem))
    sections = [torch.linalg.qr(randn(12, SIZE, seed=i)).Q for i in range(coupling.count)]
    turned = [section @ torch.linalg.qr(randn(SIZE, SIZE, seed=50 + i)).Q for i, section in enumerate(sections)]
    assert coupling.energy(sections, anchor, 0.7) == pytest.approx(coupling.energy(turned, anchor, 0.7), rel=1e-12)
    direct = 0.0
    for layer, a in enumerate(coupling.maps):
        kept = a @ projector(sections[coupling.inputs[layer]])
        kept = projector(sections[coupling.outputs[layer]]) @ kept if coupling.outputs else kept
        direct += float((a - kept).square().sum())
    pairs = zip(sections, anchor, strict=True)
    direct += 0.35 * sum(float((projector(own) - projector(other)).square().sum()) for own, other in pairs)
    assert coupling.energy(sections, anchor, 0.7) == pytest.approx(direct, rel=1e-12)


@ALL
def test_turning_channels_turns_the_answer(tying, sections, sides):
    """T10. Chained sections hold outputs and inputs in one basis, so both must turn alike. (Random starts do not turn.)"""
    structure, problem = coupled(tying=tying, sections=sections, sides=sides, starts=2, sweeps=20), family()
    rows, columns = (torch.linalg.qr(randn(12, 12, seed=i)).Q for i in (1, 1 if sections == "chained" else 2))
    turned = {name: rows @ w @ columns.T for name, w in problem.weights.items()}
    maps, other = (
        rebuild(structure, p.group, fitted(structure, p).tensors, SIZE)[0]
        for p in (problem, Problem(problem.group, turned, problem.sites, problem.metric))
    )
    for name, found in maps.items():
        torch.testing.assert_close(other[name], rows @ found @ columns.T, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("metric", ["weights", "gram"])
@pytest.mark.parametrize("shape", [(12, 12), (10, 16)])
def test_identical_layers_lose_nothing_by_tying(sides, metric, shape):
    problem = family(shape, metric)
    first = problem.group[0].name
    same = {m.name: problem.weights[first] for m in problem.group}
    problem = Problem(problem.group, same, {m.name: problem.sites[first] for m in problem.group}, problem.metric)
    errors = []
    for tying in TYINGS:
        structure = coupled(tying=tying, sections="separate", sides=sides)
        fit = fitted(structure, problem)
        errors.append(structure.report(problem.group, fit.tensors, SIZE)["error"])
        assert errors[-1] == pytest.approx(float(fit.error[SIZE] / fit.error[0]), rel=1e-9)
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("shape", [(12, 12), (10, 16), (16, 10)])
@pytest.mark.parametrize("metric", ["weights", "gram", "second_moment"])
def test_one_tied_side_is_basis_sharing_of_all_layers(shape, metric):
    """T7: the leading subspace of the stacked matrix in the mean metric. `Fit.error` is exact for one side and lambda = 0."""
    problem = family(shape, metric)
    structure = coupled(tying="tied", sides="one")
    fit = fitted(structure, problem)
    stacked = torch.cat([problem.weights[m.name] for m in problem.group])
    best = leading_directions(stacked, problem.columns())
    limit = min(shape)
    torch.testing.assert_close(fit.error, best.error[: limit + 1], atol=1e-7 * float(best.error[0]), rtol=1e-6)
    shared = STRUCTURES.build({"kind": "basis_sharing", "layers": LAYERS, "roles": ["o_proj"]})
    assert shared.groups(problem.group) == structure.groups(problem.group)
    for size in (1, SIZE):
        maps, numbers = rebuild(structure, problem.group, fit.tensors, size)
        assert numbers == shared.numbers(problem.group, size, {})
        expected = best.left[:, :size] @ best.right[:size]
        torch.testing.assert_close(torch.cat(list(maps.values())), expected, atol=1e-6, rtol=1e-6)


@ALL
def test_numbers_of_shared_sections(tying, sections, sides):
    structure, d = coupled(tying=tying, sections=sections, sides=sides), 12
    places = {"free": LAYERS, "grouped": 2, "tied": 1}[tying]
    chain = {"free": LAYERS + 1, "grouped": 3, "tied": 1}[tying]
    bases = chain if sections == "chained" else 2 * places
    expected = SIZE * d * bases + LAYERS * SIZE**2 if sides == "two" else SIZE * d * (places + LAYERS)
    problem = family()
    assert structure.numbers(problem.group, SIZE, fitted(structure, problem).tensors) == expected
    assert structure.numbers(problem.group, SIZE, {}) == expected


def test_the_descent_runs_once_for_a_size_and_is_logged(monkeypatch, caplog):
    structure, problem, calls = coupled(), family(), []
    assert structure.optimised_at_size
    assert STRUCTURES.build({"kind": "low_rank"}).report(problem.group[:1], {}, SIZE) is None
    fit = fitted(structure, problem)
    monkeypatch.setattr("winnow.numerics.coupling.solve", lambda *args: calls.append(args) or solve(*args))
    with caplog.at_level("INFO"):
        structure.stored(problem.group, fit.tensors, SIZE)
    structure.report(problem.group, fit.tensors, SIZE)
    assert len(calls) == 1
    assert "000-003.o_proj, size 4: error" in caplog.text
    structure.report(problem.group, fit.tensors, SIZE + 1)
    structure.report(problem.group, dict(fit.tensors), SIZE + 1)
    assert len(calls) == 3


def test_groups_are_roles_of_one_shape():
    a, b = family().group, family((10, 16)).group
    other = Matrix(0, "q_proj", "layers.0.q_proj", "attention_input", (12, 12), False, False)
    structure = coupled()
    assert structure.groups([a[1], a[0], other, b[2]]) == [[a[0], a[1]], [other], [b[2]]]
    assert structure.limit(b) == 10


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`sides: one` has no output sections"):
        coupled(sides="one", sections="chained")
    for strength in (-1.0, float("nan"), "much"):
        with pytest.raises(ValueError, match="anchor_strength"):
            coupled(anchor_strength=strength)
    problem = family()
    with pytest.raises(ValueError, match="cannot weight outputs, as two_sided does"):
        Method.model_validate({"structure": {"kind": "coupled"}, "metric": {"kind": "two_sided"}})
    zero = {m.name: {"gram": torch.zeros(12, 12, dtype=torch.float64)} for m in problem.group}
    with pytest.raises(FloatingPointError, match=r"the inputs' metric of 000\.o_proj"):
        fitted(coupled(), Problem(problem.group, problem.weights, zero, METRICS.build({"kind": "gram"})))


IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def build(source: Path, work: Path, options: dict) -> tuple[Path, dict]:
    """All stages from a model directory to a checkpoint in the metric `weights`: ({directory}, dense weights by name)."""
    write_json(work / "model.json", describe(source))
    files, structure, metric = ModelFiles(work / "model.json"), coupled(**options), METRICS.build({"kind": "weights"})
    rows = []
    for name, fit, numbers in fit_groups(files, None, None, {}, structure, metric, "1-of-1", "cpu"):
        write_tensors(work / "factors" / f"{name}.safetensors", storable(structure, fit))
        rows.append({"group": name, "error": fit.error.numpy(), "numbers": torch.tensor(numbers).numpy()})
    spectra = pd.DataFrame(rows).set_index("group")
    write_manifest(work / "factors", {"groups": list(spectra.index)}, {})
    groups = chosen_groups(files, structure, ["ffn", "attention"], spectra)
    sizes = allocate(groups, {"keep_bytes": None, "rank": 5, "rank_fraction": None}).sizes
    bundle = Bundle(work / "factors" / "manifest.json")
    parts = list(compressed(files, dict.fromkeys(sizes, bundle), structure, sizes))
    method = {"structure": {"kind": "coupled", **options}, "metric": {"kind": "weights"}}
    presets = {"model": {"source": "somewhere"}, "method": method, "budget": {"targets": ["ffn", "attention"]}}
    recipe = recipe_of({"model": "pico"}, presets, summarize(groups, sizes))
    write_checkpoint(work / "checkpoint", files, parts, "float32", recipe, {})
    return work / "checkpoint", {module: layout for part in parts for module, layout in part.layouts.items()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("tying", "sides"), [("free", "two"), ("tied", "two"), ("tied", "one"), ("grouped", "two")])
def test_checkpoints_store_shared_tensors_once(tying, sides, saved_model, tmp_path):
    checkpoint, layouts = build(saved_model, tmp_path / "work", {"tying": tying, "sides": sides, "sweeps": 3})
    shared = {f"{module}.{name}" for module, layout in layouts.items() for name in layout["shared"]}
    assert shared, "the test is about sharing"
    tensors = load_file(checkpoint / "model.safetensors")
    assert not shared & set(tensors)
    model = load_model(checkpoint, "float32", "cpu")
    # What a module computes is what its parts say, biases included.
    for module, layout in layouts.items():
        own = model.get_submodule(module)
        part = {name: tensors.get(f"{module}.{name}", tensors.get(layout["shared"].get(name, ""))) for name in own.state_dict()}
        x = torch.randn(3, layout["in"], generator=torch.Generator().manual_seed(1))
        y = x @ part["input"] @ part["core.weight"].T if sides == "two" else x @ part["right.weight"].T
        y = y @ part["left.weight"].T + part.get("left.bias", torch.zeros(layout["out"]))
        torch.testing.assert_close(own(x), y)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(model))
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(tensors)
    again.save_pretrained(tmp_path / "third")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "third" / "model.safetensors").read_bytes()
