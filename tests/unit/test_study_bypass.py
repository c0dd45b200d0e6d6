"""The study of bypasses: arithmetic on shapes alone, effective ranks by hand, and verdicts that follow the numbers."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import ROOT, pico
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import write_json
from winnow.models.architectures import FFN_ROLES, TARGETS, matrices_of, moments_file
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.structures.base import STRUCTURES
from winnow.studies import base as studies
from winnow.studies.base import Evidence, Given
from winnow.studies.bypass import figures as bypass_figures
from winnow.studies.bypass import study as bypass_study
from winnow.studies.bypass.accounting import LLAMA_8B, Ranks, dense, llama_tensors, parameters, reachable, removed, stored
from winnow.studies.bypass.grc import basis, projected_error, sink_gain
from winnow.studies.bypass.measures import formula_bytes, identities
from winnow.studies.bypass.ranks import ends, hourglass, hourglasses, profile
from winnow.studies.bypass.study import ROWS
from winnow.studies.claims import FAILS, HOLDS, IMPOSSIBLE, OTHER, UNDECIDED, UNTESTED, judge, read_claims
from winnow.studies.trials import Trial

STUDY = studies.study_of("bypass")
CLAIMS = [c for c in read_claims(ROOT / "resources" / "claims.yaml") if c.study == "bypass"]
BIG = llama_tensors(LLAMA_8B)
BIG_MATRICES, BIG_TOTAL = matrices_of("llama", BIG), parameters(BIG)
LLAMA, WINDOWS = "Llama-3.1-8B", 8
SHARED, LOW_RANK = {"kind": "shared_basis"}, {"kind": "low_rank"}


def test_the_config_alone_gives_every_parameter_of_llama():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B))
    assert {name: list(p.shape) for name, p in model.named_parameters()} == {n: r["shape"] for n, r in BIG.items()}
    assert BIG_TOTAL == 8_030_261_248
    assert 100 * dense(m for m in BIG_MATRICES if m.role in TARGETS["ffn"]) / BIG_TOTAL == pytest.approx(70.2, abs=0.05)


# % of all parameters and of the blocks, by a hand count of 4096 x 14336, 4096 x 4096 and 4096 x 1024.
COUNTS = [
    (Ranks(0.25, 0), 0, 5.85, 6.73),
    (Ranks(0.25, 0), 3, 9.19, 10.58),
    (Ranks(0.25, 0), 6, 12.54, 14.42),
    (Ranks(0, 0.5), 0, 8.36, 9.62),
    (Ranks(0, 0.5), 1, 25.07, 28.85),
    (Ranks(0, 0.5), 2, 28.41, 32.69),
    (Ranks(0, 0.5), 6, 35.10, 40.38),
    (Ranks(0.25, 0.5), 1, 30.92, 35.58),
    (Ranks(0.25, 0.5), 3, 37.61, 43.27),
    (Ranks(0.25, 0.5, 1 / 16), 3, 32.38, 37.26),
    (Ranks(0.25, 0.75, 1 / 16), 3, 11.49, 13.22),
]


@pytest.mark.parametrize(("ranks", "convention", "of_all", "of_blocks"), COUNTS)
def test_what_the_papers_ranks_remove(ranks, convention, of_all, of_blocks):
    row = removed(BIG_MATRICES, BIG_TOTAL, ranks)[convention]
    assert row["of_all"] == pytest.approx(of_all, abs=0.005)
    assert row["of_blocks"] == pytest.approx(of_blocks, abs=0.005)


def test_row_five_recounted_in_three_lines():
    """3328 of 4096 as two factors grows an FFN matrix; even without redundant numbers, 27 % is out of reach."""
    assert 3328 * (4096 + 14336) > 4096 * 14336
    ffn = 3 * 4096 * 14336 - (3328 * (4096 + 2 * 14336 - 3328) + 3328 * (4096 + 14336 - 3328))
    attention = 2 * 4096 * (4096 + 1024) - (1024 * (4096 + 6144 - 1024) + 1024 * (8192 - 1024))
    most = 100 * 32 * (ffn + attention) / dense(BIG_MATRICES)
    assert reachable(removed(BIG_MATRICES, BIG_TOTAL, Ranks(0.25, 0.75, 1 / 16)))[1] == pytest.approx(most)
    assert most < 27


def files_of(family, folder) -> ModelFiles:
    pico(family).save_pretrained(folder / "model")
    write_json(folder / "model.json", describe(folder / "model"))
    return ModelFiles(folder / "model.json")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def files(request, tmp_path_factory) -> ModelFiles:
    return files_of(request.param, tmp_path_factory.mktemp(request.param))


def moments_of(files: ModelFiles) -> SimpleNamespace:
    """Statistics of random inputs of mixed scale that are not centred."""
    found: dict[str, dict] = {}
    for m in files.matrices:
        generator = torch.Generator().manual_seed(100 * m.layer + len(m.site))
        n = m.shape[1]
        x = torch.randn(n, 400, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]
        x += torch.randn(n, 1, generator=generator, dtype=torch.float64)
        site = found.setdefault(moments_file(m.layer), {})
        site |= {f"{m.site}.gram": x @ x.T / 400, f"{m.site}.mean": x.mean(1), f"{m.site}.x": x}
    return SimpleNamespace(tensors=found.__getitem__)


def test_formulas_count_what_structures_store(files):
    ranks = Ranks(0.25, 0.5, 1 / 16)
    parts = {"qkv": SHARED, "ffn": {"kind": "bypass", "kept_fraction": 1 / 16, "remainder": SHARED}}
    forms = {"bypass": STRUCTURES.build({"kind": "by_target", "parts": parts})}
    forms["own"] = STRUCTURES.build({"kind": "by_target", "parts": {"ffn": {**parts["ffn"], "remainder": LOW_RANK}}})
    for form, structure in forms.items():
        expected = {"qkv": 0, "ffn": 0}
        for group in structure.groups(files.matrices):
            target = "qkv" if group[0].role in TARGETS["qkv"] else "ffn"
            size = round({"qkv": 0.25, "ffn": 0.5}[target] * structure.whole(group))
            expected[target] += structure.numbers(group, size, {})
        assert stored([m for m in files.matrices if m.role in TARGETS["ffn"]], form, ranks) == expected["ffn"]
        if expected["qkv"]:
            qkv = stored([m for m in files.matrices if m.role in TARGETS["qkv"]], "qkv", ranks)
            assert qkv == expected["qkv"]
            biases = sum(m.shape[0] for m in files.matrices if m.role != "o_proj" and m.bias)
            assert formula_bytes(files, ranks) == 4 * (qkv + expected["ffn"] + biases)


def test_effective_ranks_by_hand(files):
    moments = moments_of(files)
    rows = {(row["layer"], row["role"], row["metric"]): row for row in profile(files, moments)}
    m = next(m for m in files.matrices if m.role == "down_proj" and m.layer == 1)
    w, x = files.weight(m).numpy(), moments.tensors(moments_file(1))[f"{m.site}.x"].numpy()
    for metric, values in (("weights", w), ("outputs", w @ x / 20)):
        energy = np.linalg.svd(values, compute_uv=False) ** 2
        p, own = energy / energy.sum(), rows[1, "down_proj", metric]
        assert own["k95"] * min(w.shape) == pytest.approx(1 + (np.cumsum(p) < 0.95).sum())
        assert own["stable"] * min(w.shape) == pytest.approx(1 / p.max())
        assert own["entropy"] * min(w.shape) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    y = w @ x
    y = np.linalg.svd(y - y.mean(1, keepdims=True), compute_uv=False) ** 2
    rank = 1 + (np.cumsum(y) / y.sum() < 0.9).sum()
    assert rows[1, "down_proj", "outputs"]["rrr90"] * min(w.shape) == pytest.approx(rank)


def test_an_hourglass_is_high_at_both_ends():
    assert ends(30) == (6, 5)
    assert ends(6) == (2, 1)
    shaped = hourglass([5.0, 4.0, 1.0, 1.0, 1.0, 3.0])
    assert shaped["excess"] == pytest.approx(200)
    assert shaped["chance"] == pytest.approx(36 / 720), "the orders with the three low layers in the middle"
    assert hourglass([1.0, 1.0, 5.0, 5.0, 5.0, 1.0])["excess"] == pytest.approx(-80)
    assert hourglass([9.0, 9.0, 5.0, 5.0, 5.0, 4.0])["excess"] == pytest.approx(-20), "one high end is none"
    long = hourglass([float(i % 7) for i in range(32)])
    assert 0 < long["chance"] < 1
    with pytest.raises(ValueError, match="2 layers have no middle"):
        hourglass([1.0, 2.0])


def test_identities_hold_and_notice_what_breaks_them(files, monkeypatch):
    found = identities(files, moments_of(files), 1 / 16)
    assert len(found) == 6
    assert max(found.values()) < 1e-12
    monkeypatch.setattr("winnow.studies.bypass.measures.basis", lambda stack, power=1: basis(stack, power).flip(1))
    assert (
        identities(files, moments_of(files), 1 / 16)["shared basis of q, k, v and of gate, up = truncated SVD of the stack"]
        > 1e-3
    )


def test_columns_kept_exact_by_hand():
    """With all the energy in one column, keeping it exact loses next to nothing; with equal columns it costs rank."""
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn(48, 32, generator=generator, dtype=torch.float64)
    spiked = stack * torch.where(torch.arange(32) == 5, 100.0, 1.0)
    k = 8
    plain = float(torch.linalg.svdvals(spiked)[k:].square().sum())
    rest = spiked[:, [i for i in range(32) if i != 5]]
    rank = (k * (32 + 48) - 48) // (31 + 48)
    kept = float(torch.linalg.svdvals(rest)[rank:].square().sum())
    assert sink_gain(spiked, k) == pytest.approx(100 * (1 - kept / plain))
    assert sink_gain(stack, k) < 0
    powered = basis(stack, 4)
    assert not torch.equal(powered, basis(stack)), "another matrix was decomposed"
    assert projected_error(stack, powered[:, :k]) == pytest.approx(projected_error(stack, basis(stack)[:, :k]), rel=1e-12)
    assert projected_error(stack, basis(stack)[:, :k]) == pytest.approx(
        float(torch.linalg.svdvals(stack)[k:].square().sum() / stack.square().sum())
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    files = files_of("llama", tmp_path_factory.mktemp("measured"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bypass_study, "TIMED", {"batches": [1], "prompts": [8], "decode": 2, "repeats": 2, "warm_up": 1})
        return STUDY.measure(Given(files, "float32", "cpu", moments_of(files)))  # type: ignore[arg-type]


def test_the_model_that_is_timed_has_the_best_map_of_rank_k_for_q_k_v_and_the_rest_dense(files):
    model = load_model(files.verify(), "float32", "cpu")
    trial = Trial.of(files, None, STUDY.methods["grc"], "cpu", ["qkv"])
    form, expected = trial.model(model, trial.of_rank(0.25)), copy.deepcopy(model)
    qkv = [m for m in files.matrices if m.role in TARGETS["qkv"]]
    assert len(trial.factors) == len({m.layer for m in qkv}), "nothing else is fitted"
    for layer in {m.layer for m in qkv}:
        group = [m for m in qkv if m.layer == layer]
        stack = torch.cat([files.weight(m) for m in group])
        k = round(0.25 * min(stack.shape))
        u = torch.linalg.svd(stack).U[:, :k]
        for m, part in zip(group, (u @ u.T @ stack).split([m.shape[0] for m in group]), strict=True):
            expected.get_submodule(m.module).weight.data.copy_(part.T if m.transposed else part)
        rights = {form.get_submodule(m.module).right.weight.data_ptr() for m in group}
        assert len(rights) == 1, "stored once, and one product"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits, dense, found = (one(input_ids=ids, use_cache=False).logits for one in (expected, model, form))
    torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-3)
    assert float((dense - logits).abs().max()) > 1e-2
    rest = [m for m in files.matrices if m not in qkv]
    assert all(type(form.get_submodule(m.module)) is type(model.get_submodule(m.module)) for m in rest)


RIPPLE = [0.0, 0.1, -0.1, 0.05, -0.05, 0.1, 0.0, -0.1]


def evidence(found: dict, losses: dict[tuple[str, str], float]) -> Evidence:
    """Synthetic losses above dense (0.3 by default); windows differ by a ripple in proportion to the loss."""
    rows, results = [], {}
    for cell in [("dense", "dense"), *STUDY.cells]:
        above, key = 0.0 if cell[0] == "dense" else losses.get(cell, 0.3), "/".join(cell)
        nll = [100 * (2.0 + above * (1 + r / 20)) + i for i, r in enumerate(RIPPLE)]
        results[key] = {"per_window": {"nll": nll, "tokens": [100] * WINDOWS}}
        own = {"keep_bytes": 0.6, "delta_nll": above, "delta_nll_se": 0.001, "perplexity": 2.718 ** (2 + above)}
        own |= {"dense_bytes": 1000 * (1 + cell[1].startswith("gate")), "stored_bytes": 500 * (1 + cell[1].startswith("gate"))}
        name = next((n for n, row in ROWS.items() if row.cell == cell), None)
        if name in found["stored_bytes"]:
            own["stored_bytes"] = found["stored_bytes"][name]
        own |= {"model_dense_bytes": 4000, "model_stored_bytes": 3000}
        rows.append({"model": "m", "method": cell[0], "budget": cell[1], "recovery": "none", "result": key, **own})
    return Evidence(pd.DataFrame(rows), results, {"m": found})


def verdicts(found: dict, losses: dict[tuple[str, str], float], drawn: bool = False) -> pd.Series:
    functions = {} if drawn else dict.fromkeys(STUDY.figures, mock.DEFAULT)  # figures take longest, and once is enough
    with mock.patch.multiple(bypass_figures, **functions) if functions else nullcontext():
        conclusion = STUDY.conclude(evidence(found, losses))
    plt.close("all")
    assert set(conclusion.tables) == set(STUDY.tables)
    assert set(conclusion.figures) == set(STUDY.figures)
    assert all(len(table) for name, table in conclusion.tables.items() if name != "hourglass")
    assert (conclusion.identities["residual"] < 1e-8).all()
    return judge(CLAIMS, conclusion.answers).set_index(["id", "model"])["verdict"]


def test_verdicts_follow_the_numbers(measured):
    flat = verdicts(measured, {}, drawn=True)
    assert flat["bypass_removed_attention", LLAMA] == IMPOSSIBLE
    assert flat["bypass_removed_larger", LLAMA] == IMPOSSIBLE
    assert flat["bypass_own_sum", LLAMA] == flat["bypass_own_recovery", LLAMA] == flat["bypass_own_rise", LLAMA] == IMPOSSIBLE
    assert flat["grc_full", "m"] == flat["grc_bytes", LLAMA] == IMPOSSIBLE
    for name in ("ffn", "both", "bypass"):
        assert flat[f"bypass_removed_{name}", LLAMA] == HOLDS, "within reach, each by itself"
    assert flat["bypass_ffn_share", LLAMA] == FAILS, "70.2 %"
    assert flat["bypass_hourglass_weights", "m"] == UNTESTED, "two layers have no middle"
    assert flat["bypass_loss_both", "m"] == OTHER
    assert flat["bypass_against_rank", "m"] == FAILS
    assert flat["bypass_calibration", "m"] == HOLDS
    kept = {("both_bypass", "both-0.62"): 0.045, ("grc", "both-rank-0.5"): 0.274, ("grc", "qkv-rank-0.25"): 0.479}
    as_claimed = verdicts(measured, kept)
    assert as_claimed["bypass_recovery", "m"] == HOLDS
    assert as_claimed["bypass_against_shared", "m"] == HOLDS
    assert as_claimed["bypass_loss_both", "m"] == HOLDS
    assert as_claimed["grc_loss_1024", "m"] == HOLDS
    worse = verdicts(
        measured, {("both_bypass", "both-0.62"): 0.4, ("whitened", "both-0.62"): 0.1, ("bypass_svd", "ffn-0.6"): 0.2}
    )
    assert worse["bypass_recovery", "m"] == FAILS
    assert worse["bypass_calibration", "m"] == FAILS
    assert worse["bypass_against_rank", "m"] == HOLDS
    third = verdicts(measured, {("svd", "down-rank-0.375"): 0.1, ("svd", "gate-up-rank-0.375"): 0.6})
    assert third["bypass_cost_ratio_weights", "m"] == HOLDS


def test_verdicts_on_ranks_and_their_profile(measured):
    layers = 6
    shape = [0.9, 0.8, 0.2, 0.3, 0.25, 0.7]
    rows = [
        {"layer": i, "role": role, "metric": metric, "ambient": 64, **dict.fromkeys(("k95", "stable", "entropy", "rrr90"), value)}
        for i in range(layers)
        for role in ("up_proj", "down_proj")
        for metric, value in (("weights", shape[i] if role == "up_proj" else shape[i] / 3), ("outputs", 1 - shape[i]))
    ]
    found = {
        **measured,
        "layers": layers,
        "ranks": rows,
        "hourglass": hourglasses(rows, [r for r in FFN_ROLES if "gate" not in r]),
    }
    own = verdicts(found, {})
    assert own["bypass_hourglass_weights", "m"] == HOLDS
    assert own["bypass_hourglass_outputs", "m"] == FAILS
    assert own["bypass_hourglass_chance", "m"] == FAILS
    assert own["bypass_rank_ratio_weights", "m"] == HOLDS
    assert own["bypass_rank_ratio_outputs", "m"] == FAILS
    assert UNDECIDED not in set(own.filter(like="hourglass"))


def test_the_verdict_on_speed_is_of_decoding_beside_dense(measured):
    assert [row["phase"] for row in measured["latency"]] == ["prefill", "decode"]
    for ratio, error, expected in ((0.9, 0.01, HOLDS), (1.0, 0.1, UNDECIDED), (1.1, 0.01, FAILS)):
        rows = [
            {**row, **dict(zip(("ratio", "ratio_low", "ratio_high"), (r, r - error, r + error), strict=True))}
            for row, r in zip(measured["latency"], (2 - ratio, ratio), strict=True)
        ]
        with mock.patch.multiple(bypass_figures, **dict.fromkeys(STUDY.figures, mock.DEFAULT)):
            conclusion = STUDY.conclude(evidence({**measured, "latency": rows}, {}))
        assert judge(CLAIMS, conclusion.answers).set_index(["id", "model"])["verdict"]["grc_speed", "m"] == expected
        answer = conclusion.answers["grc_speed"]["m"]
        assert answer.value == pytest.approx(100 / ratio), "of the dense speed, in %"
        assert answer.error == pytest.approx(25 * (1 / (ratio - error) - 1 / (ratio + error)))
