"""Learned sizes: exact bytes in every step, masks that become truncations, and sizes that go where the loss asks for them."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tests.conftest import pico
from tests.unit.test_allocations import allocated, random_groups, refused
from tests.unit.test_checkpoint import logits, statistics
from winnow.allocation import learning, masks
from winnow.allocation.base import ALLOCATIONS, stored_bytes
from winnow.allocation.groups import TOLERANCE, allocate, chosen_groups, learned_choice, summarize
from winnow.allocation.learning import learn, put_masked
from winnow.allocation.masks import Sizes
from winnow.checkpoint.in_memory import put
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.writer import compress
from winnow.errors import InputError
from winnow.factors.fit import fit_groups, storable
from winnow.io.artifacts import Bundle, write_json, write_manifest, write_tensors
from winnow.metrics.base import METRICS
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

WINDOWS = torch.randint(0, 1024, (16, 24), generator=torch.Generator().manual_seed(5))
HALF = {"keep_bytes": 0.5, "allocation": {"kind": "uniform"}}
QUICK = {"kind": "learned", "steps": 24, "batch": 4, "every": 8}
FAMILIES = ["llama", "gpt2", "opt"]  # nn.Linear without biases, Conv1D, nn.Linear with biases


def fitted(work, model, kind="low_rank"):
    """(files, structure, groups, factors) of a model, in the error of its weights."""
    model.save_pretrained(work / "model")
    statistics(work / "model", work / "statistics")
    files, structure, rows = ModelFiles(work / "statistics" / "model.json"), STRUCTURES.build({"kind": kind}), []
    metric = METRICS.build({"kind": "weights"})
    for name, fit, numbers in fit_groups(files, None, None, {}, structure, metric, "1-of-1", "cpu"):
        write_tensors(work / "factors" / f"{name}.safetensors", storable(structure, fit) | {"numbers": torch.tensor(numbers)})
        rows.append({"group": name, "numbers": numbers, "error": fit.error.tolist()})
    write_manifest(work / "factors", {}, {})
    bundle = Bundle(work / "factors" / "manifest.json")
    groups = chosen_groups(files, structure, ["ffn", "attention"], pd.DataFrame(rows).set_index("group"))
    return files, structure, groups, {row["group"]: bundle for row in rows}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return fitted(tmp_path_factory.mktemp(request.param), pico(request.param))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model whose matrices are all of rank 2 but for some noise, save one, which is of full rank and large."""
    model, name = pico("llama"), "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        for where, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in where and where != name:
                u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_((u * (s * (torch.arange(len(s)) < 2) + 1e-4)) @ v)
        model.get_submodule(name).weight.mul_(4)
    return fitted(tmp_path_factory.mktemp("planted"), model), "001.down_proj"


def learned(found, keep, **options):
    files, _, groups, factors = found
    budget = {"keep_bytes": keep, "allocation": ALLOCATIONS.build({**QUICK, **options}).options.model_dump()}
    given = ALLOCATIONS.build(budget["allocation"]).options
    return learn(files, factors, groups, budget, given, WINDOWS, "float32", "cpu")


def sizes_of(groups, keep, seed=0):
    """Random cuts and gates."""
    sizes = Sizes(groups, dict.fromkeys((g.name for g in groups), 1), keep * sum(g.dense for g in groups))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (sizes.cut, sizes.gate):
        parameter.data = 3 * torch.randn(len(parameter), generator=generator, dtype=torch.float64)
    return sizes


def gauge_fixed(groups):
    structure = STRUCTURES.build({"kind": "gauge_fixed"})
    whole = {g.name: range(structure.largest(g.matrices) + 1) for g in groups}
    numbers = {g.name: [structure.numbers(g.matrices, size, {}) for size in whole[g.name]] for g in groups}
    return [replace(g, structure=structure, numbers=numbers[g.name]) for g in groups]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["low_rank", "gauge_fixed"])
def test_bytes_are_those_allowed_whatever_the_parameters_are(keep, kind):
    groups = random_groups(3, 20) if kind == "low_rank" else gauge_fixed(random_groups(3, 20))
    for seed in range(5):
        sizes = sizes_of(groups, keep, seed)
        cuts, dense = sizes.spread()
        rows = zip(groups, cuts.tolist(), dense.tolist(), strict=True)
        stored = sum(p * g.dense + (1 - p) * masks.bytes_at(g, c) for g, c, p in rows)
        assert stored == pytest.approx(sizes.allowed, rel=1e-6)
        rounded = stored_bytes(groups, found := sizes.rounded())
        assert set(found) == {g.name for g in groups}
        assert sizes.allowed - TOLERANCE * sum(g.dense for g in groups) <= rounded <= sizes.allowed


def test_gradients_are_those_along_the_budget():
    sizes = sizes_of(random_groups(4, 6), 0.6)
    ones = torch.ones_like(sizes.gate)
    assert torch.autograd.gradcheck(lambda cut, gate: sizes.shifted(cut, gate, ones), (sizes.cut, sizes.gate), eps=1e-5)
    cuts, _ = sizes.spread()
    (gradient,) = torch.autograd.grad((cuts * torch.arange(6)).sum(), sizes.cut)
    assert bool((gradient.sign().unique() == torch.tensor([-1.0, 1.0])).all()), "what one group gains, others give up"
    one = Sizes(sizes.every[:1], {sizes.every[0].name: None}, 0.6 * sizes.every[0].dense)
    assert torch.isfinite(torch.stack(one.spread())).all()


def test_masks_are_worth_the_mean_over_draws():
    """The squared error of independent directions under masks is that of cuts and gates drawn at random."""
    (g,) = random_groups(7, 1)
    sizes = Sizes([g], {g.name: g.largest // 2}, 0.5 * g.dense)
    (mask,), lacking = sizes.masks(0.1)
    cut, dense = sizes.spread()
    squares = torch.linspace(5, 1, g.largest)
    error = (lacking * (1 - mask)).square() @ squares
    chance = torch.sigmoid((cut + 0.5 - torch.arange(1, g.largest + 1)) / (0.1 * g.largest)).float()
    assert error.item() == pytest.approx(((1 - dense).float() * ((1 - chance) @ squares)).item(), rel=1e-4)
    (narrow,), _ = sizes.masks(0.0)
    assert bool((narrow.diff() <= 0).all()), "leading directions first"


def test_a_narrow_mask_is_a_truncation(family, monkeypatch):
    """The masked model, its gates shut and its cuts at whole sizes, is the compressed one; with open gates, the dense one."""
    monkeypatch.setattr(masks, "LEAST", 1e-6)
    monkeypatch.setattr(masks, "ENDS", 1e-9)
    files, structure, groups, factors = family
    chosen = allocate(groups, HALF).sizes
    sizes = Sizes(groups, chosen, stored_bytes(groups, chosen))
    sizes.gate.data.fill_(-30.0)
    model = load_model(files.verify(), "float32", "cpu")
    expected = logits(model)
    modules = put_masked(model, groups, factors)
    assert torch.equal(logits(model), expected)
    soft, lacking = sizes.masks(0.0)
    assert [round(mask.sum().item()) for mask in soft] == [chosen[g.name] for g in groups]
    compressed = load_model(files.verify(), "float32", "cpu")
    put(compressed, *compress(files, factors, structure, chosen))
    for module, mask, rest in zip(modules, soft, lacking, strict=True):
        module.mask, module.lacking = mask.detach(), rest.detach()
    assert torch.allclose(logits(model), logits(compressed), atol=2e-5)
    for g, module in zip(groups, modules, strict=True):
        module.mask, module.lacking = torch.ones(chosen[g.name]), None
    assert torch.allclose(logits(model), logits(compressed), atol=1e-5)
    for module in modules:
        module.mask, module.lacking = torch.ones(module.left.shape[1]), torch.tensor(0.0)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_what_makes_no_difference_is_left_out_of_the_computation_alone(family):
    """Logits, and where the cuts go, are the same without directions that are masked to 0 and without the side not chosen."""
    files, _, groups, factors = family
    sizes = sizes_of(groups, 0.5)
    model = load_model(files.verify(), "float32", "cpu").requires_grad_(False)
    modules, found = put_masked(model, sizes.groups, factors), []
    sizes.gate.data.copy_(sizes.decided())
    for whole in (True, False):
        left = 0
        for module, mask, rest in zip(modules, *sizes.masks(0.005), strict=True):
            if whole:
                module.mask, module.lacking = mask, rest
            else:
                module.put(mask, rest, decided=True)
                assert module.lacking is None
                left += module.mask is None or len(module.mask) < len(mask)
        values = learning.logits_of(model, WINDOWS[:4])
        found.append((values, torch.autograd.grad(values.square().mean(), sizes.cut)[0]))
    assert left > len(modules) / 2
    assert {module.mask is None for module in modules} == {True, False}
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-3 * float(found[0][1].abs().max()))
    assert found[1][1].abs().max() > 0
    modules[0].put(mask, rest, decided=False)
    assert modules[0].lacking is rest


def test_gates_that_are_all_open_leave_nothing_to_learn(family, monkeypatch):
    """Where all bytes are kept; that is no error."""
    monkeypatch.setattr(Sizes, "decided", lambda self: torch.full_like(self.gate, 80.0))
    monkeypatch.setattr(Sizes, "shifted", lambda self, cut, gate, moved: self.at(cut, gate)[:2])
    monkeypatch.setattr(Sizes, "rounded", lambda self: dict.fromkeys(g.name for g in self.every))
    result = learned(family, 0.6, every=24)  # an earlier look would end it before the gates are decided
    assert result.record["held_out_best"] == 0
    assert result.record["best_step"] == 24
    assert set(result.sizes.values()) == {None}


def test_what_is_learned_is_no_worse_than_its_start_and_the_same_again(family):
    _, _, groups, _ = family
    found = learned(family, 0.6)
    record, dense = found.record, sum(g.dense for g in groups)
    assert record["held_out_best"] < record["held_out_start"]
    assert record["looks"][0]["held_out"] == record["held_out_start"]
    assert [look["step"] for look in record["looks"]] == [0, 8, 16, 24]
    assert all(0.6 - TOLERANCE <= look["keep_bytes"] <= 0.6 for look in record["looks"])
    assert 0.6 - TOLERANCE <= stored_bytes(groups, found.sizes) / dense <= 0.6
    assert summarize(groups, found.sizes)["keep_bytes"] <= 0.6
    again = learned(family, 0.6)
    assert json.dumps([again.sizes, again.record]) == json.dumps([found.sizes, record])


def test_fewer_numbers_for_the_same_product_are_counted(tmp_path):
    found = fitted(tmp_path, pico("llama"), "gauge_fixed")
    result, groups = learned(found, 0.6), found[2]
    assert 0.6 - TOLERANCE <= stored_bytes(groups, result.sizes) / sum(g.dense for g in groups) <= 0.6
    assert result.record["held_out_best"] < result.record["held_out_start"]


def test_a_start_that_nothing_beats_is_kept(planted, monkeypatch):
    found, _ = planted
    groups = found[2]
    monkeypatch.setattr(Sizes, "rounded", lambda self: dict.fromkeys((g.name for g in groups), 1))
    result = learned(found, 0.5)
    assert result.sizes == allocate(groups, HALF).sizes
    assert result.record["best_step"] == 0
    assert result.record["held_out_best"] == result.record["held_out_start"]


def test_bytes_go_to_the_matrix_that_matters(planted):
    """From equal shares: it ends dense, which no size of a product reaches, and the others pay for it."""
    found, name = planted
    result = learned(found, 0.5, steps=100)
    assert result.sizes[name] is None
    assert result.record["held_out_best"] < 0.1 * result.record["held_out_start"]
    assert result.record["looks"][0]["left_dense"] == []
    assert name in result.record["looks"][-1]["left_dense"]


def test_a_loss_that_is_not_finite_names_the_step(family, monkeypatch):
    whole = learning.kl_divergence
    monkeypatch.setattr(learning, "kl_divergence", lambda p, q: whole(p, q) * (float("nan") if q.requires_grad else 1.0))
    with pytest.raises(FloatingPointError, match="learn_sizes: the loss is not finite at step 1"):
        learned(family, 0.6)


def test_what_cannot_be_learned_is_refused(family, tmp_path):
    files, structure, groups, factors = family
    with pytest.raises(InputError, match="16 calibration windows, 2 of them held out, are too few for a batch of 15"):
        learned(family, 0.6, batch=15)
    expert = replace(groups[0].matrices[0], expert=0)
    with pytest.raises(InputError, match="experts of a mixture receive too few tokens"):
        learned((files, structure, [replace(groups[0], matrices=[expert]), *groups[1:]], factors), 0.6)
    write_json(tmp_path / "learned.json", {"sizes": {"a": None}, "held_out_start": 2.0, "held_out_best": 1.0, "best_step": 3}, {})
    choice = learned_choice(str(tmp_path / "learned.json"))
    assert choice.sizes == {"a": None}
    assert choice.facts == {"held_out_start": 2.0, "held_out_best": 1.0, "best_step": 3}


def test_a_configuration_that_cannot_learn_is_refused_by_its_key():
    def of_structure(method):
        def change(c):
            c["budgets"]["x"] = allocated("learned")
            c["experiments"]["demo"] |= {"methods": [method], "budgets": ["x"]}

        return change

    for method in ("ffsplit", "basis_sharing", "modegpt_mlp", "coupled", "bypass"):
        assert "budget 'x' learns the rank of a product of two factors, which " in refused(of_structure(method))
    assert "did you mean 'start'" in refused(lambda c: c["budgets"].update(x=allocated("learned", starts="ilp")))
    assert ALLOCATIONS.build({"kind": "learned", "start": "ilp"}).predicts()
    assert not ALLOCATIONS.build({"kind": "learned"}).predicts()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")
def test_learning_can_go_on_from_the_integer_programme():
    groups = random_groups(2, 12)
    one, other = (ALLOCATIONS.build({"kind": kind, **more}) for kind, more in (("learned", {"start": "ilp"}), ("ilp", {})))
    assert one.allocate(groups, 0.6).sizes == other.allocate(groups, 0.6).sizes
    sizes = Sizes(groups, start := other.allocate(groups, 0.6).sizes, 0.6 * sum(g.dense for g in groups))
    assert {name for name, size in sizes.rounded().items() if size is None} == {n for n, size in start.items() if size is None}
