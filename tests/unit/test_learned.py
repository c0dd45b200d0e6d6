"""Linearity before training: from the config alone, the same by rows, exact where it must be, and verdicts that turn."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import transformers

from tests.conftest import ROOT, TINY, pico
from winnow.checkpoint.loading import load_model
from winnow.models.architectures import matrices_of
from winnow.models.experts import unfuse
from winnow.studies import base as studies
from winnow.studies.base import Evidence, Given
from winnow.studies.claims import FAILS, HOLDS, UNDECIDED, UNTESTED, judge, read_claims
from winnow.studies.linearity.learned import (
    FRESH,
    RESIZED,
    SEEDS,
    change,
    change_rows,
    learned_rows,
    resize,
    sizes_of,
    untrained,
    untrained_blocks,
)
from winnow.studies.linearity.recoverability import ffn_blocks

FOLDS = 5
CLAIMS = [c for c in read_claims(ROOT / "resources" / "claims.yaml") if c.study == "linearity"]
IDS = torch.randint(0, 1024, (30, 64), generator=torch.Generator().manual_seed(3))


def saved(folder, name, **options):
    """The directory of a random model, the sizes of its parameters, and its dense blocks."""
    class_name, known = TINY[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(9)
    cls(cls.config_class(**{**known, **options})).save_pretrained(folder)
    model = load_model(folder, "float32", "cpu")
    shapes = {n: {"shape": list(p.shape)} for n, p in model.named_parameters()}
    return folder, sizes_of(model), ffn_blocks(matrices_of(model.config.model_type, shapes))


def measured(folder, sizes, blocks):
    rows = untrained_blocks(folder, sizes, blocks, IDS, FOLDS, "float32", "cpu")
    return {(row["weights"], row["seed"], row["layer"]): row for row in rows}


def test_an_untrained_block_by_rows_and_a_general_solver(tmp_path):
    found = measured(*saved(tmp_path, "llama"))
    assert set(found) == {(w, seed, layer) for w in (FRESH, RESIZED) for seed in SEEDS for layer in (0, 1)}
    cls, options = TINY["llama"]
    torch.manual_seed(SEEDS[1])
    model, seen = getattr(transformers, cls)(transformers.LlamaConfig(**options)).eval(), {}
    model.model.layers[1].mlp.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(input_ids=IDS)
    x, y = (seen[key].flatten(0, 1).double() for key in "xy")
    x, cut = torch.cat([x, torch.ones(len(x), 1)], 1), len(x) * 4 // 5
    left = (y[cut:] - x[cut:] @ torch.linalg.lstsq(x[:cut], y[:cut]).solution).square().sum()
    row = found[FRESH, SEEDS[1], 1]
    assert row["scalar"] == pytest.approx(1 - float(left / (y[cut:] - y[cut:].mean()).square().sum()), abs=1e-6)
    assert row["feature"] == pytest.approx(1 - float(left / (y[cut:] - y[cut:].mean(0)).square().sum()), abs=1e-6)


def test_fresh_weights_are_of_the_config_alone_and_of_their_seed(tmp_path):
    folder, _, _ = saved(tmp_path, "llama", initializer_range=0.05)
    before = torch.get_rng_state()
    one, same, other = (untrained(folder, "float32", "cpu", seed).model.embed_tokens.weight.detach() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.05
    assert not torch.equal(one, load_model(folder, "float32", "cpu").model.embed_tokens.weight)
    assert float(one.std()) == pytest.approx(0.05, rel=0.02)
    assert untrained(folder, "bfloat16", "cpu", 0).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_resized_weights_differ_from_the_trained_in_direction_alone(family):
    trained, model = unfuse(pico(family, 5)), unfuse(pico(family, 6))
    with torch.no_grad():
        for i, p in enumerate(trained.parameters()):
            p.mul_(1 + i).add_(0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    resize(model, sizes_of(trained))
    goal = {name: p.detach() for name, p in trained.named_parameters()}
    for name, p in model.named_parameters():
        own = p.detach()
        if p.dim() < 2:
            assert torch.equal(own, goal[name]), name
        elif before[name].any():
            assert float(own.norm()) == pytest.approx(float(goal[name].norm()), rel=1e-5), name
            assert float(torch.cosine_similarity(own.flatten(), before[name].flatten(), 0)) == pytest.approx(1, abs=1e-5), name
        else:
            assert not own.any(), "zeros have no direction"
    with pytest.raises(ValueError, match="sizes are from another model"):
        resize(pico("opt"), sizes_of(trained))


def test_the_second_untrained_model_is_the_first_at_the_trained_sizes(tmp_path):
    """Where the trained sizes are those of the start, both are the same; where they are large, a gate's output curves more."""
    folder, _, blocks = saved(tmp_path, "gpt2")
    own = measured(folder, sizes_of(untrained(folder, "float32", "cpu", SEEDS[0])), blocks)
    large = {name: 30 * size for name, size in sizes_of(untrained(folder, "float32", "cpu", SEEDS[0])).items()}
    curved = measured(folder, large, blocks)
    for layer in (0, 1):
        assert own[RESIZED, SEEDS[0], layer]["scalar"] == pytest.approx(own[FRESH, SEEDS[0], layer]["scalar"], abs=1e-5)
        assert curved[RESIZED, SEEDS[0], layer]["scalar"] < own[FRESH, SEEDS[0], layer]["scalar"] - 0.05


def test_a_block_without_a_curved_activation_is_linear_trained_or_not_and_a_gated_one_never(tmp_path):
    straight = measured(*saved(tmp_path / "straight", "gpt2", activation_function="linear"))
    assert all(row[key] == pytest.approx(1, abs=1e-9) for row in straight.values() for key in ("scalar", "feature"))
    curved = measured(*saved(tmp_path / "curved", "gpt2"))
    assert all(0.9 < row["scalar"] < 0.9999 for key, row in curved.items() if key[0] == FRESH), "small inputs see a straight line"
    gated = measured(*saved(tmp_path / "gated", "llama", hidden_act="linear"))
    assert all(row["scalar"] < 0.9 for row in gated.values()), "the product of two linear maps"


def test_dense_layers_of_a_mixture(tmp_path):
    found = measured(*saved(tmp_path, "qwen3_moe", mlp_only_layers=[1]))
    assert {layer for _, _, layer in found} == {1}


def result(trained, fresh, resized):
    """What the study measures, where only R^2 matters; fresh and resized by seed."""
    layers = range(len(trained))
    own = {"scalar_fold_se": 0.01, "no_first_token": 0.5, "times_smaller": 8.0, "median": 0.5, "tokens": [], "ranks": []}
    rows = [
        {"weights": weights, "seed": seed, "layer": i, "scalar": models[seed][i], "feature": models[seed][i] - 0.1}
        for weights, models in ((FRESH, fresh), (RESIZED, resized))
        for seed in range(len(models))
        for i in reversed(layers)
    ]
    steps = [{"inputs": name, "step": 0, "r2": 0.5} for name in ("closed form", "as they are", "standardised")]
    probe = {"layer": 0, "trained": steps, "bilinear_gain": 0.0}
    loss = {"rank": 8, "healed": "no", "delta_nll": 0.1, "delta_nll_se": 0.01}
    healed = [{**loss, "layer": 0, "healed": "affine above control"}]
    return {
        "blocks": [{"layer": i, "scalar": v, "feature": v - 0.1, **own} for i, v in enumerate(trained)],
        "learned": rows,
        "probes": {"most": probe, "least": probe},
        "swaps": [{**loss, "layer": i, "delta_nll": 0.1 * (i + 1)} for i in layers],
        "healed": {"most": healed, "least": healed},
        "identities": {"nothing": 0.0},
    }


def verdicts(found):
    study = studies.study_of("linearity")
    conclusion = study.conclude(Evidence(pd.DataFrame(), {}, {"m": found}))
    assert set(conclusion.tables) == set(study.tables)
    assert set(conclusion.figures) == set(study.figures)
    for figure in conclusion.figures.values():
        plt.close(figure)
    return judge(CLAIMS, conclusion.answers).set_index("id")["verdict"], conclusion


UP, LOW = [0.9, 0.8, 0.7, 0.75, 0.85, 0.65] * 4, [0.3, 0.2, 0.1, 0.15, 0.25, 0.05] * 4
DOWN = [0.7 - v for v in UP]


@pytest.mark.parametrize(
    ("trained", "fresh", "resized", "expected"),
    [
        (UP, [LOW, LOW, LOW], [LOW, LOW, LOW], (HOLDS, HOLDS, FAILS)),
        (UP, [LOW, LOW, LOW], [UP, UP, UP], (HOLDS, FAILS, FAILS)),  # the size explains it all
        (UP, [UP, UP, UP], [LOW, LOW, LOW], (FAILS, HOLDS, FAILS)),
        (LOW, [UP, UP, UP], [LOW, LOW, LOW], (FAILS, FAILS, FAILS)),  # training made blocks less linear
        (UP, [DOWN, DOWN, DOWN], [LOW, LOW, LOW], (HOLDS, HOLDS, HOLDS)),  # another order
        (UP, [LOW, UP, DOWN], [LOW, UP, LOW], (UNDECIDED, UNDECIDED, FAILS)),  # seeds differ too much
    ],
)
def test_the_verdict_on_learning_turns_with_the_numbers(trained, fresh, resized, expected):
    found, _ = verdicts(result(trained, fresh, resized))
    assert tuple(found[f"linearity_learned{part}"] for part in ("", "_directions", "_order")) == expected


def test_errors_over_blocks_and_seeds_add_in_squares():
    found = result([0.8, 0.6], [[0.5, 0.5], [0.3, 0.3]], [[0.1, 0.1], [0.1, 0.1]])
    mean, error = change(found, FRESH, "scalar")
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx((0.1**2 + 0.1**2) ** 0.5)  # differences 0.4 and 0.2 by block, 0.2 and 0.4 by seed
    assert change(found, RESIZED, "scalar") == (pytest.approx(0.6), pytest.approx(0.1))
    rows = {(row["weights"], row["layer"]): row for row in learned_rows(found)}
    assert rows[FRESH, 1]["scalar"] == pytest.approx(0.4)
    assert rows[FRESH, 1]["scalar_se"] == pytest.approx(0.1)
    assert rows[FRESH, 1]["feature"] == pytest.approx(0.3)
    assert rows["trained", 0]["scalar"] == 0.8
    assert [(row["against"], row["definition"]) for row in change_rows(found)][1] == (FRESH, "feature")


def test_one_block_decides_nothing_and_none_is_no_model_for_the_study():
    found, _ = verdicts(result([0.9], [[0.1], [0.1]], [[0.1], [0.1]]))
    assert found["linearity_learned"] == found["linearity_learned_order"] == UNDECIDED
    absent, conclusion = verdicts({"missing": "the model has no FFN but mixtures of experts"})
    assert set(absent) == {UNTESTED}
    assert set(absent.index) == {c.id for c in CLAIMS}
    assert all(frame.empty for frame in conclusion.tables.values())
    assert conclusion.identities.empty


def test_a_mixture_is_measured_as_missing():
    shapes = {name: {"shape": list(p.shape)} for name, p in unfuse(pico("mixtral")).named_parameters()}
    given = Given(SimpleNamespace(matrices=matrices_of("mixtral", shapes)), "float32", "cpu", windows=IDS, evaluation=(IDS, IDS))
    assert studies.study_of("linearity").measure(given) == {"missing": "the model has no FFN but mixtures of experts"}
