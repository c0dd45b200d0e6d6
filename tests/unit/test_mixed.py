"""Choosing between structures: the programme against brute force, its bound, checkpoints of several structures, refusals."""

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.conftest import ROOT, pico
from tests.unit.test_allocations import best_of
from tests.unit.test_checkpoint import logits, statistics
from tests.unit.test_recovery import KINDS, losses, run
from winnow.allocation.base import ALLOCATIONS, dense_bytes, stored_bytes
from winnow.allocation.blocks import places_of, ways_of
from winnow.allocation.groups import TOLERANCE, Group, allocate, chosen_groups, experts_left_dense, summarize
from winnow.allocation.kinds.ilp import options_of
from winnow.allocation.rounds import Setting, predict_in_rounds
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect
from winnow.checkpoint.export import export_dense
from winnow.checkpoint.in_memory import put
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.writer import compress, compressed, recipe_of, write_checkpoint
from winnow.errors import InputError
from winnow.factors.beside import put_beside
from winnow.factors.fit import fit_groups, left_dense, storable
from winnow.factors.members import factors_of
from winnow.factors.predict import predict
from winnow.io.artifacts import MANIFEST, Bundle, write_manifest, write_tensors
from winnow.metrics.base import METRICS
from winnow.models.architectures import FFN_ROLES, SITES, Matrix
from winnow.models.files import ModelFiles
from winnow.models.shape import shape_of
from winnow.planning.config import Method, load
from winnow.planning.config_files import default
from winnow.planning.forecast import forecast
from winnow.planning.plan import Plan
from winnow.structures.base import STRUCTURES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
MIXED = {"kind": "mixed"}
MEMBERS = {"@low_rank": "matrix", "@gauge_fixed": "matrix", "@neuron_slice": "ffn", "@affine_block": "ffn"}
ILP = {"kind": "ilp"}
WINNOW = default()["methods"]["winnow"]["structure"]


def random_groups(seed, ffns, others, most=4):
    """Groups of `ffns` FFNs of three matrices and of `others` matrices, each by every member that applies and dense."""
    draws, structure = np.random.default_rng(seed), STRUCTURES.build({"kind": "low_rank"})
    blocks = [[Matrix(i, role, f"{i}.{role}", SITES[role], (9, 9), False, False) for role in FFN_ROLES if role != "gate_up_proj"]
              for i in range(ffns)]  # fmt: skip
    blocks += [[Matrix(i, "q_proj", f"{i}.q_proj", "attention_input", (9, 9), False, False)] for i in range(others)]
    groups = []
    for matrices in blocks:
        dense = {m.name: int(draws.integers(300, 500)) for m in matrices}
        groups += [Group(m.name, [m], structure, 0, 0, dense[m.name], [0], [0.0], [0.0]) for m in matrices]
        for end, of in MEMBERS.items():
            for part in [matrices] if of == "ffn" else [[m] for m in matrices]:
                if of == "ffn" and len(part) < 3:
                    continue
                count, whole = int(draws.integers(1, most)), sum(dense[m.name] for m in part)
                numbers = [0, *sorted(draws.choice(np.arange(1, whole), count, replace=False).tolist())]
                loss = [whole / 100, *sorted(draws.uniform(0, whole / 100, count).tolist(), reverse=True)]
                name = f"{part[0].layer:03d}." + ".".join(m.role for m in part) + end
                groups.append(Group(name, part, structure, 1, 0, whole, numbers, loss, loss))
    return groups


def loss(groups, sizes):
    return sum(g.predicted[size] for g in groups if (size := sizes.get(g.name)) is not None)


def every_choice(groups):
    """(bytes, losses): of all allocations, block by block written out without the code under test."""
    totals, losses = np.zeros(1), np.zeros(1)
    for layer, of_ffn in sorted({(g.matrices[0].layer, g.matrices[0].role in FFN_ROLES) for g in groups}):
        mine = [g for g in groups if (g.matrices[0].layer, g.matrices[0].role in FFN_ROLES) == (layer, of_ffn)]

        def options(some):
            pairs = [(g.bytes(s), g.predicted[s]) for g in some for s in range(1, g.largest + 1)]
            return pairs + [(g.dense, 0.0) for g in some if not g.largest]

        roles = sorted({m.role for g in mine for m in g.matrices})
        singles = [options([g for g in mine if [m.role for m in g.matrices] == [role]]) for role in roles]
        found = [tuple(map(sum, zip(*combined, strict=True))) for combined in itertools.product(*singles)]
        found += options([g for g in mine if len(g.matrices) > 1])
        totals = np.add.outer(totals, [b for b, _ in found]).ravel()
        losses = np.add.outer(losses, [v for _, v in found]).ravel()
    return totals, losses


@pytest.mark.parametrize("seed", range(12))
def test_the_programme_is_the_best_of_all_choices_on_small_cases(seed):
    groups = random_groups(seed, 1 + seed % 2, 2, most=4 if seed % 2 == 0 else 3)
    dense = dense_bytes(groups)
    assert dense == sum(g.dense for g in groups if not g.largest)
    allowed = (0.3 + 0.05 * seed) * dense
    totals, losses = every_choice(groups)
    best = best_of(losses, totals, allowed, dense)
    choice = ALLOCATIONS.build({**ILP, "gap": 0.0}).allocate(groups, allowed / dense)
    assert stored_bytes(groups, choice.sizes) <= allowed
    assert loss(groups, choice.sizes) == pytest.approx(best, rel=1e-6)
    assert choice.facts["value"] == pytest.approx(best, rel=1e-6)
    assert choice.facts["bound"] <= best * (1 + 1e-9)
    again = ALLOCATIONS.build({**ILP, "gap": 0.0}).allocate(list(reversed(groups)), allowed / dense)
    assert again.sizes == choice.sizes


def test_every_matrix_is_stored_once_and_all_members_are_used():
    groups, used = random_groups(3, 20, 20, most=8), set()
    by_name = {g.name: g for g in groups}
    for keep in (0.4, 0.6, 0.8, 0.9):
        choice = allocate(groups, {"keep_bytes": keep, "allocation": ILP})
        names = [m.name for name in choice.sizes for m in by_name[name].matrices]
        assert sorted(names) == sorted({m.name for g in groups for m in g.matrices})
        assert all(size is None or 1 <= size <= by_name[name].largest for name, size in choice.sizes.items())
        dense = dense_bytes(groups)
        assert (keep - TOLERANCE) * dense <= stored_bytes(groups, choice.sizes) <= keep * dense
        facts = summarize(groups, choice.sizes)
        assert facts["dense_bytes"] == dense
        assert facts["stored_bytes"] == stored_bytes(groups, choice.sizes)
        assert facts["predicted"] == pytest.approx(choice.facts["value"])
        assert choice.facts["bound"] <= choice.facts["value"] * (1 + 1e-9)
        used |= {name.partition("@")[2] for name, size in choice.sizes.items() if size is not None}
        used |= {"dense" for size in choice.sizes.values() if size is None}
        without = ALLOCATIONS.build({**ILP, "leave_dense": False}).allocate(groups, keep)
        assert None not in without.sizes.values()
        assert without.facts["value"] >= choice.facts["value"] * (1 - 1e-3)
    assert used == {"dense", *(end[1:] for end in MEMBERS)}


def test_the_bound_is_that_of_the_linear_relaxation():
    """Against HiGHS: a variable per option and per way to store a block."""
    from scipy.optimize import linprog

    groups = sorted(random_groups(5, 6, 4, most=8), key=lambda g: g.name)
    facts = ALLOCATIONS.build(ILP).allocate(groups, 0.6).facts
    tables = [options_of(g, g.predicted, True) for g in groups]
    at = places_of(groups)
    blocks = ways_of(list(at))
    assert sorted(len(ways) for ways in blocks) == [1] * 4 + [2] * 6
    starts = np.cumsum([0, *(len(t.sizes) for t in tables)])
    ways = [(block, way) for block, found in enumerate(blocks) for way in found]
    width = starts[-1] + len(ways)
    equal, right = [], []
    for place, indices in at.items():
        row = np.zeros(width)
        for g in indices:
            row[starts[g] : starts[g + 1]] = 1
        row[starts[-1] :] = [-1.0 if place in way else 0.0 for _, way in ways]
        equal.append(row)
        right.append(0.0)
    for block in range(len(blocks)):
        equal.append(np.r_[np.zeros(starts[-1]), [float(of == block) for of, _ in ways]])
        right.append(1.0)
    none = np.zeros(len(ways))
    relaxed = linprog(
        np.r_[np.concatenate([t.losses for t in tables]), none],
        A_ub=np.r_[np.concatenate([t.bytes for t in tables]), none][None],
        b_ub=[0.6 * dense_bytes(groups)],
        A_eq=np.array(equal),
        b_eq=right,
    )
    assert facts["bound"] == pytest.approx(relaxed.fun, rel=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "greedy", "energy", "per_type"])
def test_other_allocations_do_not_choose(kind):
    with pytest.raises(InputError, match=f"{kind} cannot choose between structures; use `keep_bytes` with the allocation `ilp`"):
        allocate(random_groups(0, 2, 2), {"keep_bytes": 0.6, "allocation": {"kind": kind}})


def refused(**changes):
    config = copy.deepcopy(default())
    config["budgets"]["x"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": ILP, **changes.get("budget", {})}
    if "keep_bytes" in changes.get("without", ()):
        del config["budgets"]["x"]["keep_bytes"], config["budgets"]["x"]["allocation"]
    config["methods"]["mixed"] = {"structure": {**MIXED, **changes.get("structure", {})}, "metric": {"kind": "gram"}}
    config["methods"] |= changes.get("methods", {})
    config["experiments"]["demo"] |= {"methods": ["mixed"], "budgets": ["x"]}
    with pytest.raises(InputError) as error:
        Plan(load(config), ROOT)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_chosen_is_refused_by_its_key():
    no = "experiments.demo: mixed (mixed) chooses between structures by predicted loss, which budget 'x' does not; set its `keep_"
    for kind in ("uniform", "greedy", "energy", "per_type"):
        assert no in refused(budget={"allocation": {"kind": kind}})
    assert no in refused(budget={"allocation": {**ILP, "objective": "metric"}})
    assert no in refused(budget={"rank": 4}, without=("keep_bytes",))
    where, low_rank = "methods.mixed.structure: ", {"kind": "low_rank"}
    assert f"{where}duplicate member low_rank" in refused(structure={"members": [low_rank, low_rank]})
    line = refused(structure={"members": [low_rank, {"kind": "split"}]})
    assert f"{where}split has no predicted losses to choose by" in line
    assert "mixed has no predicted losses" in refused(structure={"members": [low_rank, MIXED]})
    line = refused(structure={"members": [{"kind": "neuron_slice"}, {"kind": "affine_block"}]})
    assert f"{where}no member replaces single matrices" in line
    own = {"structure": {"kind": "low_rank"}, "metric": {"kind": "weights"}}
    line = refused(structure={"members": [{"kind": "neuron_slice", "ridge": 0.5}, low_rank]}, methods={"mixed.neuron_slice": own})
    assert "methods.mixed.neuron_slice: the name is taken by a member of 'mixed'" in line


def planned(method):
    config = copy.deepcopy(default())
    config["methods"]["mine"] = method
    config["budgets"]["x"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": ILP}
    config["experiments"]["demo"] |= {"methods": ["mine"], "budgets": ["x"]}
    return Plan(load(config), ROOT)


def test_members_are_methods_and_share_their_factors():
    members = [{"kind": "low_rank"}, {"kind": "neuron_slice"}, {"kind": "affine_block", "ridge": 1e-6}]
    plan = planned({"structure": {**MIXED, "members": members}, "metric": {"kind": "gram"}})
    assert plan.members["mine"] == ["whitened", "modegpt_mlp", "mine.affine_block"]
    assert plan.config.methods["mine.affine_block"] == Method.model_validate({"structure": members[2]})
    model, calibration = plan.labels["models"]["demo"], plan.labels["calibrations"]["demo"]
    found = plan.paths.of_members(model, calibration, plan.labels["methods"]["mine"], "factors/{shard}/manifest.json")
    own = [plan.labels["methods"][name] for name in plan.members["mine"]]
    assert found == [f"results/{model}/{calibration}/{label}/factors/1-of-1/manifest.json" for label in own]
    assert plan.members["svd"] == ["svd"]
    before = Plan(load(default()), ROOT).labels["methods"]
    assert {name: label for name, label in plan.labels["methods"].items() if name in before} == before
    works = {w.stage: w for w in forecast(plan, {"demo": shape_of(ROOT / "resources" / "models" / "demo")})}
    assert works["factorize"].jobs == works["predict_losses"].jobs == 3
    assert works["compress"].jobs == 1
    wildcards = {"model": model, "method": plan.labels["methods"]["mine"], "budget": plan.labels["budgets"]["x"]}
    code = " ".join(plan.fingerprint("compress", wildcards))
    assert all(f"winnow.structures.{kind} " in code for kind in ("mixed", "low_rank", "neuron_slice", "affine_block"))
    assert "winnow.structures.gauge_fixed " not in code


def fitted_of(family, spec, work):
    """(source, files, structure, groups with predictions, factors) of a random model, whose members were fitted one by one."""
    source = work / "model"
    pico(family).save_pretrained(source)
    moments, gradients = statistics(source, work / "statistics")
    files, structure = ModelFiles(work / "statistics" / "model.json"), STRUCTURES.build(spec)
    paths, tables = [], {"spectra": [], "predicted": []}
    for end, own in structure.alternatives().items():
        metric, names = METRICS.build({"kind": "gram"}) if own.objective == "metric" else None, []
        folder = work / "factors" / end
        for name, fit, numbers in fit_groups(files, moments, gradients, {}, own, metric, "1-of-1", "cpu"):
            write_tensors(folder / f"{name}.safetensors", storable(own, fit) | {"numbers": torch.tensor(numbers)})
            names.append(name)
            tables["spectra"].append({"group": f"{name}{end}", "numbers": numbers, "error": fit.error.tolist()})
        write_manifest(folder, {"groups": names, "left_dense": {}}, {})
        paths.append(str(folder / "manifest.json"))
        bundles = factors_of(own, paths[-1:])[0]
        found = predict(files, moments, gradients, bundles, own, "cpu")
        tables["predicted"] += [{"group": f"{n}{end}", "predicted": losses.tolist()} for n, losses in found]
    frames = (pd.DataFrame(rows).set_index("group") for rows in tables.values())
    groups = chosen_groups(files, structure, ["ffn", "attention"], *frames)
    return source, files, structure, groups, factors_of(structure, paths)[0]


@pytest.fixture(scope="module", params=["llama", "opt", "phi3"])
def fitted(request, tmp_path_factory):
    return fitted_of(request.param, MIXED, tmp_path_factory.mktemp("mixed") / request.param)


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def with_bits(request, tmp_path_factory):
    """The same for the members of the preset `winnow`, of which one rounds."""
    return fitted_of(request.param, WINNOW, tmp_path_factory.mktemp("bits") / request.param)


def test_experts_without_gradients_stay_dense_whatever_the_member(tmp_path):
    pico("mixtral").save_pretrained(tmp_path / "model")
    moments, gradients = statistics(tmp_path / "model", tmp_path / "statistics")
    files, structure = ModelFiles(tmp_path / "statistics" / "model.json"), STRUCTURES.build(MIXED)
    own = structure.alternatives()["@gauge_fixed"]
    rows = [
        {"group": f"{name}@gauge_fixed", "numbers": numbers, "error": fit.error.tolist()}
        for name, fit, numbers in fit_groups(
            files, moments, gradients, {}, own, METRICS.build({"kind": "two_sided"}), "1-of-1", "cpu"
        )
    ]
    spectra, targets = pd.DataFrame(rows).set_index("group"), ["ffn", "attention"]
    groups = chosen_groups(files, structure, targets, spectra)
    assert {m.role for g in groups for m in g.matrices} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    left = experts_left_dense(files, structure, targets, spectra)
    tokens = [
        left_dense(files, moments, one, METRICS.build({"kind": "two_sided"}), "1-of-1") for one in structure.members.values()
    ]
    assert left == list(dict.fromkeys(name for found in tokens for name in found))


def by_hand(files, groups):
    """Sizes that use every member, and dense: layer 0 by a slice, layer 1 affine, one attention matrix by rank, others dense."""
    ffns = {g.name.partition("@")[2]: g for g in groups if len(g.matrices) > 1 and g.matrices[0].layer == 0}
    affine = ffns["affine_block"].name.replace("000", "001")
    sizes = {ffns["neuron_slice"].name: 20, affine: 3}
    attention = [m.name for m in files.matrices if m.role not in FFN_ROLES]
    return {**sizes, f"{attention[0]}@gauge_fixed": 5, **dict.fromkeys(attention[1:])}


def test_a_checkpoint_of_several_structures_loads_as_any_other(fitted, tmp_path):
    _, files, structure, groups, factors = fitted
    sizes = by_hand(files, groups)
    stored, layouts = compress(files, factors, structure, sizes)
    assert {layout["kind"] for layout in layouts.values()} == {"neuron_slice", "affine_block", "gauge_fixed"}
    method = {"structure": structure.options.model_dump(), "metric": {"kind": "gram"}}
    presets = {"model": {"source": "somewhere"}, "method": method, "budget": {"targets": ["ffn", "attention"]}}
    recipe = recipe_of({"model": "pico"}, presets, summarize(groups, sizes))
    assert set(recipe["sizes"]) == {name for name, size in sizes.items() if size is not None}
    write_checkpoint(tmp_path / "checkpoint", files, compressed(files, factors, structure, sizes), "float32", recipe, {})
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "@neuron_slice 20 (1x)" in card
    assert "members `gauge_fixed`, `neuron_slice`" in card
    memory = load_model(files.verify(), "float32", "cpu")
    put(memory, stored, layouts)
    loaded = load_model(tmp_path / "checkpoint", "float32", "cpu")
    assert torch.equal(logits(loaded), logits(memory))


def test_rounded_matrices_stand_beside_factors_and_dense_ones(with_bits, tmp_path):
    """Bytes are those of the files; it loads, exports, and recovers with its integers as they were, all bits among them."""
    _, files, structure, groups, factors = with_bits
    others = [("@gauge_fixed", 5), ("", None)]
    options = itertools.cycle([*(("@rounded", size) for size in (2, 6)), *others, *(("@rounded", size) for size in (3, 4, 5))])
    sizes = {f"{m.name}{end}": size for m, (end, size) in zip(files.matrices, options, strict=False)}
    stored, layouts = compress(files, factors, structure, sizes)
    presets = {"method": {"structure": structure.options.model_dump(), "metric": {"kind": "gram"}}}
    presets |= {"model": {"source": "somewhere"}, "budget": {"targets": ["ffn", "attention"]}}
    facts, folder = summarize(groups, sizes), tmp_path / "checkpoint"
    recipe = recipe_of({"model": "pico"}, presets, facts)
    write_checkpoint(folder, files, compressed(files, factors, structure, sizes), "float32", recipe, {})
    assert json.loads((folder / MANIFEST).read_text())["stored_bytes"] == facts["stored_bytes"]
    assert {layout["bits"] for layout in layouts.values() if layout["kind"] == "rounded"} >= {3, 8}
    memory, loaded = (load_model(where, "float32", "cpu") for where in (files.verify(), folder))
    put(memory, stored, layouts)
    assert torch.equal(logits(loaded), logits(memory))
    export_dense(folder, tmp_path / "export", {})
    torch.testing.assert_close(logits(load_model(tmp_path / "export", "float32", "cpu")), logits(loaded), rtol=1e-4, atol=1e-5)
    before = loaded.state_dict()
    for kind in ("sequential", "refine", "distill", "lora"):
        task, report = run(files, Bundle(folder / MANIFEST), KINDS[kind] | {"rounded": "fixed"})
        after = task.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items() if not value.is_floating_point())
        assert all(best <= start for start, best in losses(report))
        assert any(best < start for start, best in losses(report)), "the factors have learned"
    after = run(files, Bundle(folder / MANIFEST), KINDS["distill"] | {"code_rate": 0.05})[0].model.state_dict()
    changed = {key.rpartition(".")[2] for key, value in before.items() if not torch.equal(after[key], value)}
    assert {"scale", "steps", "weight"} <= changed, "factors, scales and codes"


def test_the_programme_chooses_bits_and_rounds_predict_around_them(with_bits):
    _, files, structure, groups, factors = with_bits
    budget = {"keep_bytes": 0.25, "allocation": {**ILP, "rounds": 1}}
    windows = torch.randint(0, 1024, (6, 24), generator=torch.Generator().manual_seed(5))
    setting = Setting(windows, 3, "float32", "cpu", torch.float64, True, "model", 0)
    found, records = predict_in_rounds(files, factors, structure, groups, budget, 1, setting)
    assert [record["round"] for record in records] == [0, 1]
    assert set(found) == {g.name for g in groups if g.largest}
    anew = [replace(g, predicted=found[g.name]) if g.largest else g for g in groups]
    for some in (groups, anew):
        choice = allocate(some, budget)
        assert any(name.endswith("@rounded") for name in choice.sizes)
        facts, (stored, _) = summarize(some, choice.sizes), compress(files, factors, structure, choice.sizes)
        dense = sum(g.dense for g in some if choice.sizes.get(g.name, 1) is None)
        assert facts["stored_bytes"] == dense + sum(t.nbytes for tensors in stored.values() for t in tensors.values())


def test_an_allocation_of_all_bytes_is_the_dense_model(fitted):
    source, files, structure, groups, factors = fitted
    choice = allocate(groups, {"keep_bytes": 1.0, "allocation": ILP})
    assert choice.facts["value"] == pytest.approx(0, abs=1e-12)
    stored, layouts = compress(files, factors, structure, choice.sizes)
    model = load_model(files.verify(), "float32", "cpu")
    put(model, stored, layouts)
    assert torch.allclose(logits(model), logits(load_model(source, "float32", "cpu")), atol=1e-5)


def test_targets_that_cut_an_ffn_leave_its_matrices_to_the_others(fitted):
    _, files, structure, groups, _ = fitted
    spectra = pd.DataFrame([{"group": g.name, "numbers": g.numbers, "error": g.error} for g in groups]).set_index("group")
    found = chosen_groups(files, structure, ["down_proj"], spectra)
    assert {g.name for g in found} == {f"{i:03d}.down_proj{end}" for i in (0, 1) for end in ("", "@gauge_fixed")}


def test_parts_side_by_side_read_their_own_inputs_of_a_replaced_ffn(fitted):
    """Another thread goes through the whole model between a part's first and last matrix of an FFN."""
    source, files, structure, groups, factors = fitted
    stored, layouts = compress(files, factors, structure, by_hand(files, groups))
    model, dense = (load_model(source, "float32", "cpu") for _ in range(2))
    put(model, stored, layouts)
    group = next(g for _, own, g in structure.fits(files.matrices) if own.kind() == "neuron_slice")
    put_beside(model, group, dict(dense.named_modules()))
    parts = torch.randint(0, 1024, (2, 1, 12), generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def outputs(ids):
        return model(input_ids=ids).logits

    expected, between = [outputs(ids) for ids in parts], []

    def other(_module, _args):
        hook.remove()
        between.append(pool.submit(outputs, parts[1]).result())

    with ThreadPoolExecutor(1) as pool:
        hook = model.get_submodule(group[-1].module).register_forward_pre_hook(other)
        assert torch.equal(outputs(parts[0]), expected[0])
    assert torch.equal(between[0], expected[1])


def test_statistics_around_a_model_whose_ffns_are_replaced(fitted):
    """Dense matrices beside what is stored: the same outputs, the same gradients elsewhere, and in the FFN those of its own
    matrices on the compressed model's inputs, by autograd on the dense FFN alone."""
    source, files, structure, groups, factors = fitted
    stored, layouts = compress(files, factors, structure, by_hand(files, groups))
    plain, beside, dense = (load_model(source, "float32", "cpu") for _ in range(3))
    put(plain, stored, layouts)
    put(beside, stored, layouts)
    ffns = [g for _, own, g in structure.fits(files.matrices) if own.kind() == "neuron_slice"]
    modules = dict(dense.named_modules())
    for group in ffns:
        put_beside(beside, group, modules)
    ids = torch.randint(0, 1024, (2, 12), generator=torch.Generator().manual_seed(3))
    assert torch.equal(plain(input_ids=ids).logits, beside(input_ids=ids).logits)
    options = (ids, 2, torch.float64, "text", 0)
    others = [m for m in files.matrices if m.role not in FFN_ROLES]
    expected = dict(collect_gradients(plain, others, *options))
    found = dict(collect_gradients(beside, files.matrices, *options))
    for layer, roles in expected.items():
        for role, values in roles.items():
            torch.testing.assert_close(found[layer][role]["gradient_gram"], values["gradient_gram"], rtol=1e-4, atol=1e-12)
    moments = dict(collect(beside, files.matrices, ids, 2, torch.float64))
    for group in ffns:
        down, seen, given = group[-1], {}, {}

        def read(_module, args, _output, seen=seen):
            seen["x"] = args[0]

        def give(_module, _args, output, given=given):
            output.register_hook(lambda gradient, given=given: given.update(g=gradient))

        places = (group[0].module, read), (down.module, give)
        hooks = [beside.get_submodule(name).register_forward_hook(hook) for name, hook in places]
        beside.get_input_embeddings().weight.requires_grad_()
        beside(input_ids=ids, labels=ids).loss.backward()
        x = seen["x"].detach()
        inner = [modules[m.module](x).detach().requires_grad_() for m in group[:-1]]
        parts = inner[0].chunk(2, dim=-1) if group[0].role == "gate_up_proj" else inner
        hidden = modules[down.activation](parts[0]) * (parts[1] if len(parts) > 1 else 1)
        modules[down.module](hidden).backward(given["g"])
        for hook in hooks:
            hook.remove()
        flat = hidden.detach().double().reshape(-1, down.shape[1])
        torch.testing.assert_close(moments[down.layer][down.site]["gram"], flat.T @ flat / len(flat), rtol=1e-4, atol=1e-9)
        for m, y in zip(group, inner, strict=False):
            g = y.grad.double().reshape(-1, m.shape[0]) * (ids.shape[1] - 1) * len(ids)  # a sum, where the loss is a mean
            torch.testing.assert_close(found[m.layer][m.role]["gradient_gram"], g.T @ g / len(g), rtol=1e-3, atol=1e-9)


def test_rounds_predict_anew_for_all_members(fitted):
    _, files, structure, groups, factors = fitted
    if files.manifest["model_type"] != "llama":
        pytest.skip("one family for the loop; the statistics of all are above")
    windows = torch.randint(0, 1024, (6, 24), generator=torch.Generator().manual_seed(5))
    setting = Setting(windows, 3, "float32", "cpu", torch.float64, True, "model", 0)
    budget = {"keep_bytes": 0.3, "allocation": {**ILP, "rounds": 1}}
    found, records = predict_in_rounds(files, factors, structure, groups, budget, 1, setting)
    assert [record["round"] for record in records] == [0, 1]
    assert set(found) == {g.name for g in groups if g.largest}
    sizes = allocate(groups, budget).sizes
    assert any(len(g.matrices) > 1 and sizes.get(g.name) for g in groups), "an FFN is replaced as a whole"
    assert json.dumps(found) == json.dumps(predict_in_rounds(files, factors, structure, groups, budget, 1, setting)[0])


def test_the_studies_are_valid_and_members_are_fitted_once():
    for name in ("ablation", "frontier"):
        config = copy.deepcopy(default())
        study = yaml.safe_load((ROOT / "config" / "studies" / f"{name}.yaml").read_text())
        for section, presets in study.items():
            config[section] |= {key: config[section].get(key, {}) | preset for key, preset in presets.items()}  # as by deep merge
        plan = Plan(load(config), ROOT)
        assert plan.members["winnow_factored"] == ["kfac_gauge_fixed", "neurons_by_loss", "r2lin"]
        composed = ["winnow.rounded_neuron_slice", "winnow.rounded_low_rank"]
        assert plan.members["winnow"] == [*plan.members["winnow_factored"], "rounded_two_sided.rounded", *composed]
        calibrated = {cell.calibration for cell in plan.cells if cell.method}
        assert len(calibrated) == 3, "seeds"
        for cell in plan.cells:
            text = plan.config.texts[plan.config.evaluations[cell.evaluation].text]
            kept = [file.endswith("evaluation.jsonl") for file in text.files]
            assert kept == [name == "frontier"], "choices are made on validation text, what is reported is of test text"


def test_the_study_of_rounding_fits_every_form_once():
    config = copy.deepcopy(default())
    study = yaml.safe_load((ROOT / "config" / "studies" / "rounding.yaml").read_text())
    for section, presets in study.items():
        config[section] |= presets
    plan = Plan(load(config), ROOT)
    assert plan.members["rounded_two_sided"] == ["rounded_two_sided.rounded"]
    found = plan.members["winnow"]
    assert found[:4] == ["kfac_gauge_fixed", "neurons_by_loss", "r2lin", "rounded_two_sided.rounded"]
    assert found[4:] == ["winnow.rounded_neuron_slice", "winnow.rounded_low_rank"]
    assert len({cell.budget for cell in plan.cells if cell.method == "winnow"}) == 5
