"""The study of clusters: its numbers from a few lines of algebra each, and verdicts that change with them."""

import copy
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tests.conftest import ROOT, pico, plain
from winnow.models.architectures import Matrix
from winnow.numerics.modules import LowRankLinear
from winnow.planning.config import load
from winnow.planning.plan import Plan
from winnow.studies import base as studies
from winnow.studies.base import Evidence
from winnow.studies.claims import FAILS, HOLDS, IMPOSSIBLE, OTHER, UNDECIDED, UNTESTED, judge, read_claims
from winnow.studies.clusters.correlation import jackknife, spearman
from winnow.studies.clusters.counts import counts, savings
from winnow.studies.clusters.proxies import losses_without, matrix_of, output_errors
from winnow.studies.clusters.reconstruction import cluster_blocks, gains, norm_bins, outlying, published_comparison, structureless
from winnow.studies.clusters.study import _cut, _identities, _published, _table

STUDY = studies.study_of("clusters")
CLAIMS = [c for c in read_claims(ROOT / "resources" / "claims.yaml") if c.study == "clusters"]
WINDOWS = 8


def truncated(weight: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def by_the_script(ffn: list, count: int, fraction: float) -> dict:
    labels = norm_bins(ffn[0], count)
    many = [cluster_blocks(w, labels, rows=w is ffn[-1]) for w in ffn]
    return published_comparison([cluster_blocks(w) for w in ffn], many, fraction)


def test_the_published_gain_stands_in_noise():
    """The first surprise, anew: blocks of normal entries by the script's rule against one SVD, with matrices and not spectra."""
    d, hidden, count = 24, 64, 4
    gate, up, down = structureless("noise", d, hidden)
    labels = norm_bins(gate, count)
    errors = {"one": [], "many": []}
    for w, rank in ((gate, d // 4), (up, d // 4), (down.T, hidden // 4)):  # clusters are columns of gate and up, rows of down
        w, many = w.numpy(), np.zeros(w.shape)
        for c in range(count):
            own = (labels == c).numpy()
            many[:, own] = truncated(w[:, own], hidden // count // 4)
        for name, kept in (("one", truncated(w, rank)), ("many", many)):
            errors[name].append(np.linalg.norm(w - kept) / np.linalg.norm(w))
    gain = 100 * (1 - np.mean(errors["many"]) / np.mean(errors["one"]))
    found = by_the_script([gate, up, down], count, 0.25)
    assert found["gain"] == pytest.approx(gain)
    assert gain > 15
    assert found["rank_ratio"] == pytest.approx(count * (hidden // 16) / (d // 4))
    flat = structureless("flat", d, hidden)
    flat_gain = 100 * (1 - (1 - 2 / 3) ** 0.5 / ((2 * 0.75**0.5 + (1 / 3) ** 0.5) / 3))
    assert by_the_script(flat, count, 0.25)["gain"] == pytest.approx(flat_gain)
    assert by_the_script([gate, up, down], count, 0.5)["gain"] == 100, "clusters have full rank"


def test_gains_at_equal_rank_and_numbers_are_those_of_matrices():
    (weight, *_), k = structureless("noise", 16, 40, seed=3), 8
    labels = norm_bins(weight, 4)
    found, w = gains(cluster_blocks(weight, labels), cluster_blocks(weight), k), weight.numpy()
    many = np.zeros(w.shape)
    for c in range(4):
        own = (labels == c).numpy()
        many[:, own] = truncated(w[:, own], 2)
    error = np.linalg.norm(w - many)
    assert found["equal_rank"] == pytest.approx(100 * (1 - error / np.linalg.norm(w - truncated(w, k))))
    assert found["equal_rank"] < 0, "Eckart and Young"
    numbers = 4 * 2 * (40 + 4) + 16
    size = numbers / (40 + 16)
    below, above = (np.linalg.norm(w - truncated(w, int(size) + i)) ** 2 for i in (0, 1))
    other = below + (size - int(size)) * (above - below)
    assert found["equal_bytes"] == pytest.approx(100 * (1 - error / other**0.5))
    assert found["stored"] == pytest.approx(numbers / w.size)
    assert gains(cluster_blocks(weight, labels), cluster_blocks(weight), 16) is None, (
        "one SVD of full rank has no error to compare with"
    )


def test_identities_hold_and_tables_compare_with_random_clusters():
    matrices = [Matrix(i, "up_proj", f"layers.{i}.up_proj", "ffn_input", (40, 16), False, False) for i in range(2)]
    weights = [w * torch.logspace(0, 1, 16, dtype=torch.float64) for w in structureless("noise", 16, 40)[:2]]
    generator = torch.Generator().manual_seed(0)
    keys = ("rms", "mean_abs", "max_abs", "active", "mean")
    site = {key: torch.rand(16, generator=generator, dtype=torch.float64) for key in keys}
    cut = [_cut(m, w, site) for m, w in zip(matrices, weights, strict=True)]
    found = _identities(matrices[0], weights[0], cut)
    excess, *exact = found.values()
    assert excess < 0
    assert max(exact) < 1e-12
    rows = {(r["by"], r["clusters"], r["k"]): r for r in _table(cut)}
    assert rows["random", 4, 0.25]["over_random"] == 0
    assert all(r["equal_rank"] < 0 for r in rows.values() if r["equal_rank"] is not None)
    means = [gains(cluster_blocks(w, norm_bins(w, 4)), cluster_blocks(w), 4)["equal_bytes"] for w in weights]
    assert rows["norm", 4, 0.25]["equal_bytes"] == pytest.approx(np.mean(means))
    assert rows["norm", 4, 0.25]["equal_bytes_se"] == pytest.approx(np.std(means, ddof=1) / 2**0.5)


def test_published_models_are_counted_whole():
    assert counts("Llama-3.1-8B")["total"] == 8_030_261_248
    assert counts("SmolLM2-135M")["total"] == 134_515_008
    low, high = savings("SmolLM2-135M", 512, 4, 0.75)
    ffn, out = 3 * 432 * (1536 + 144), 576 * 576
    dense = 3 * 576 * 1536 + 576 * 960 + out
    assert (low, high) == pytest.approx((dense / (ffn + out + 512 * (960 + 576)), dense / (ffn + out + 512 * 960)))


def test_columns_that_stand_out():
    values = torch.ones(100)
    values[7] = 50.0
    found = outlying(values)
    assert found == pytest.approx({"massive": 1, "top_share": 54 / 149 * 20, "largest": 50})


def test_errors_of_outputs_are_those_of_a_changed_block():
    dense, ids = pico("llama"), torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(dense)
    other.model.layers[1].mlp.down_proj.weight.data *= 0.5
    names = ["model.layers.0", "model.layers.1"]
    assert output_errors(dense, copy.deepcopy(dense), names, ids, 2) == {"blocks": 0, "logits": 0}
    found = output_errors(dense, other, names, ids, 2)
    with torch.no_grad():
        states = dense(ids, output_hidden_states=True).hidden_states
        middle, ffn = states[1].double(), []
        hook = dense.model.layers[1].mlp.register_forward_hook(lambda _m, _a, y: ffn.append(y.double()))
        out = []
        last = dense.model.layers[1].register_forward_hook(
            lambda _m, _a, y: out.append((y[0] if type(y) is tuple else y).double())
        )
        dense(ids)
        hook.remove()
        last.remove()
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (dense, other))
    added = (out[0] - middle).square().sum()
    assert found["blocks"] == pytest.approx(float((0.5 * ffn[0]).square().sum() / added) / 2, rel=1e-4)
    assert found["logits"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "layers", "down"),
    [
        ("gpt2", "transformer.h", "mlp.c_proj"),
        ("opt", "model.decoder.layers", "fc2"),
        ("gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h"),
    ],
)
def test_blocks_of_every_form_are_compared(family, layers, down):
    dense, ids = pico(family), torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    other, names = copy.deepcopy(dense), [f"{layers}.0", f"{layers}.1"]
    assert output_errors(dense, other, names, ids, 2) == {"blocks": 0, "logits": 0}
    other.get_submodule(f"{layers}.1.{down}").weight.data *= 0.5
    found = output_errors(dense, other, names, ids, 2)
    assert 0 < found["blocks"] < 0.125 + 1e-6, "half of what one of two FFNs adds is gone, or less where attention adds too"
    assert found["logits"] > 0


def test_a_column_left_out_is_a_column_at_zero():
    model, ids = pico("llama"), torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    down = Matrix(0, "down_proj", "model.layers.0.mlp.down_proj", "ffn_hidden", (64, 96), False, False)
    (found,) = losses_without(model, down, [5], ids)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.data[:, 5] = 0
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, other))
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    module = LowRankLinear(6, 4, 2, bias=True)
    assert torch.allclose(matrix_of(module, 6), (module.left.weight @ module.right.weight).double(), atol=1e-6)
    assert torch.allclose(matrix_of(nn.Linear(3, 2), 3), matrix_of(nn.Linear(3, 2), 3)) is False


def test_rank_correlations_and_their_errors():
    xs, ys = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    assert spearman(xs, ys) == pytest.approx(1 - 6 * 4 / (5 * 24))
    value, error = jackknife(lambda items: float(np.mean([ys[i] for i in items])), 5)
    assert (value, error) == pytest.approx((3.0, np.std(ys, ddof=1) / 5**0.5)), "of a mean it is the usual standard error"


def test_a_study_can_have_recoveries_with_the_dense_model_beside_them():
    plan = Plan(load(plain()), ROOT)
    cells = plan.studies.of("clusters")
    keys = [tuple(own.values()) for _, own in cells]
    assert len(set(keys)) == len(keys)
    assert keys[:2] == [("dense", "dense", "none"), ("dense", "dense", "lora")]
    by_key = {key: cell for (cell, _), key in zip(cells, keys, strict=True)}
    healed, start = by_key["dense", "dense", "lora"], by_key["asvd", "ffn-0.4", "lora"]
    assert (healed.method, healed.recovery, healed.calibration) == (None, "lora", "demo")
    assert (start.method, start.recovery) == ("asvd", "lora")
    assert plan.paths.result(by_key["svd", "ffn-0.6", "none"]) in {plan.paths.result(cell) for cell in plan.cells}, (
        "cells are shared"
    )
    of = plan.studies.checkpoints("clusters", plan.labels["models"]["demo"])
    assert len(of) == len(cells) - 1
    assert {c["manifest"] for c in of if c["recovery"] == "lora"} >= {f"{plan.paths.recovered(healed)}/checkpoint/manifest.json"}
    same = plain()
    same["recoveries"]["mine"] = STUDY.recoveries["lora"]
    assert Plan(load(same), ROOT).of_studies["clusters"]["lora"] == "mine", "a preset of the same content serves"


@pytest.fixture(scope="module")
def measured() -> dict:
    """Numbers as `measure` gives them; of the local table only what claims read is typed in."""
    gain = {"stored": 0.3, "equal_rank": -15.0, "equal_rank_se": 0.5, "equal_bytes": -9.0, "equal_bytes_se": 0.5}
    gain |= {"gauge_fixed": -12.0, "gauge_fixed_se": 0.5, "over_random": 0.1, "over_random_se": 0.2, "matrices": 18}
    table = [
        {"by": by, "clusters": c, "k": k, **gain} for by in ("norm", "cosine", "activation") for c in (4, 8) for k in (0.25, 0.5)
    ]
    errors = [
        {
            "method": m,
            "budget": b,
            "weights": 0.5 - 0.1 * nats(m, b),
            "activations": nats(m, b) / 9,
            "blocks": nats(m, b) / 7,
            "logits": nats(m, b),
        }
        for m, b, recovery in map(studies.key_of, STUDY.cells)
        if recovery == "none"
    ]
    massive = [
        {"layer": i, "score": score, "columns": 96, "massive": n, "top_share": 4.0, "largest": 9.0, "left_out": rho + 0.01 * i}
        for score, n, rho in (("activation", 6.0, 0.8), ("weight norm", 1.0, 0.05))
        for i in range(3)
    ]
    noise = _published([structureless("noise", 16, 40)], (24, 64))
    return {
        "reconstruction": table,
        "published": noise,
        "flatness": 0.85,
        "errors": errors,
        "massive": massive,
        "training": {"svd": {"trained_numbers": 10, "tokens": 100, "best_step": 5}},
        "identities": {"a": 0.0},
    }


def nats(method: str, budget: str, recovery: str = "none") -> float:
    """Losses above dense of the synthetic cells: no two alike."""
    if method == "dense":
        return -0.2 if recovery == "lora" else 0.0
    own = 1 + list(STUDY.methods).index(method) / 50
    return own * {"ffn-0.4": 0.8}.get(budget, 0.4) * (0.25 if recovery == "lora" else 1.0)


def evidence(found: dict, losses: dict | None = None) -> Evidence:
    rows, results = [], {}
    keys = [("dense", "dense", "none"), ("dense", "dense", "lora"), *map(studies.key_of, STUDY.cells)]
    for i, key in enumerate(keys):
        delta, name = (losses or {}).get(key, nats(*key)), "/".join(key)
        ripple = [math.sin(i + w) for w in range(WINDOWS)]
        results[name] = {"per_window": {"nll": [300 + 100 * delta + r for r in ripple], "tokens": [100] * WINDOWS}}
        own = {"keep_bytes": 0.4, "delta_nll": delta, "delta_nll_se": 0.01, "kl": delta, "perplexity": math.exp(3 + delta)}
        rows.append({"model": "m", "method": key[0], "budget": key[1], "recovery": key[2], "result": name, **own})
    return Evidence(pd.DataFrame(rows), results, {"m": found})


def verdicts(found: dict, losses: dict | None = None) -> pd.Series:
    conclusion = STUDY.conclude(evidence(found, losses))
    assert set(conclusion.tables) == set(STUDY.tables)
    assert set(conclusion.figures) == set(STUDY.figures)
    plt.close("all")
    frame = judge(CLAIMS, conclusion.answers)
    assert set(frame["id"]) == {c.id for c in CLAIMS}
    return frame.groupby("id")["verdict"].first()


def test_verdicts_change_with_the_numbers(measured):
    found = verdicts(measured)
    assert found["clusters_gain_noise"] == FAILS
    assert found["clusters_gain_equal_rank"] == IMPOSSIBLE
    assert found["clusters_gain_equal_bytes"] == FAILS
    assert found["clusters_over_random"] == UNDECIDED
    assert found["clusters_ffn_share"] == IMPOSSIBLE
    assert found["clusters_savings"] == IMPOSSIBLE
    assert found["clusters_massive"] == HOLDS
    assert found["clusters_norm_uncorrelated"] == HOLDS
    assert found["clusters_activation_correlated"] == HOLDS
    assert found["clusters_near_zero"] == FAILS
    assert found["clusters_proxy"] == HOLDS
    assert found["clusters_proxy_activation"] == HOLDS
    assert found["clusters_lora_open"] == FAILS
    assert found["clusters_lora_control"] == FAILS
    assert found["clusters_lora_best"] == HOLDS
    table = [{**row, "equal_bytes": 23.0, "over_random": 3.0} for row in measured["reconstruction"]]
    massive = [{**row, "left_out": 0.6, "massive": 2.0} for row in measured["massive"]]
    errors = [{**row, "weights": row["logits"]} for row in measured["errors"]]
    loss = {("tiers_activation", "ffn-0.4", "lora"): -0.1, ("tiers_weight_norm", "down-rank-0.5", "none"): 3.55}
    loss |= {("dense", "dense", "lora"): 0.1}
    other = verdicts({**measured, "reconstruction": table, "massive": massive, "errors": errors}, loss)
    assert other["clusters_gain_equal_bytes"] == HOLDS
    assert other["clusters_over_random"] == HOLDS
    assert other["clusters_massive"] == FAILS
    assert other["clusters_norm_uncorrelated"] == FAILS
    assert other["clusters_proxy"] == FAILS
    assert other["clusters_down"] == HOLDS
    assert found["clusters_down"] == OTHER if nats("tiers_weight_norm", "x") > nats("tiers_activation", "x") + 0.02 else UNDECIDED
    assert other["clusters_lora_open"] == HOLDS
    assert other["clusters_lora_control"] == HOLDS
    missing = verdicts({"missing": "the model has no FFN but mixtures of experts"})
    assert missing["clusters_gain"] == UNTESTED
    assert missing["clusters_down"] != UNTESTED


def test_gaps_are_closed_in_nats_and_in_perplexity(measured):
    """The second surprise, anew: one share of a gap in perplexity is another share in nats, and less against the control."""
    rows = STUDY.conclude(evidence(measured)).tables["distillation"].set_index("start")
    row, cells = rows.loc["svd"], {"before": ("svd", "ffn-0.4"), "after": ("svd", "ffn-0.4", "lora")}
    nll = {name: nats(*key) for name, key in {**cells, "healed": ("dense", "dense", "lora")}.items()}
    assert row["closed_raw"] == pytest.approx(100 * (1 - (math.exp(nll["after"]) - 1) / (math.exp(nll["before"]) - 1)), abs=0.5)
    assert 0 < row["closed_raw_se"] < 1
    assert row["closed"] == pytest.approx(100 * (1 - nll["after"] / nll["before"]), abs=0.5)
    assert row["closed_control"] == pytest.approx(100 * (1 - (nll["after"] - nll["healed"]) / nll["before"]), abs=0.5)
    assert row["closed_control"] < row["closed"] < row["closed_raw"]
    assert rows.loc["dense", "after"] == pytest.approx(nll["healed"], abs=0.02)
