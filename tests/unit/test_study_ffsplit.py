"""The study of FFSplit: what it measures against a few lines of algebra on a tiny model, and verdicts that follow numbers."""

import copy
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from tests.conftest import ROOT, VOCABULARY, pico
from tests.unit.test_checkpoint import statistics
from winnow.checkpoint.loading import load_model
from winnow.evaluation.spread import paired
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES
from winnow.structures.split import Split
from winnow.studies import base as studies
from winnow.studies.base import Evidence, Given
from winnow.studies.claims import FAILS, HOLDS, IMPOSSIBLE, OTHER, UNDECIDED, UNTESTED, judge, read_claims
from winnow.studies.ffsplit import study as ffsplit
from winnow.studies.ffsplit.figures import drawn
from winnow.studies.ffsplit.heavy import Ffn, concentration, count_of, ffns_of, zeroed
from winnow.studies.ffsplit.quantised import answered, bits_of, quantised_pairs, rounded
from winnow.studies.ffsplit.sizes import counted, published
from winnow.studies.trials import Trial, loss

STUDY = studies.study_of("ffsplit")
CLAIMS = [c for c in read_claims(ROOT / "resources" / "claims.yaml") if c.study == "ffsplit"]
IDS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(3))
FIRST = torch.ones(6, dtype=torch.int64)
WINDOWS = 8


def given_of(family: str, folder) -> Given:
    pico(family).save_pretrained(folder / "model")
    moments, _ = statistics(folder / "model", folder)
    return Given(ModelFiles(folder / "model.json"), "float32", "cpu", moments, evaluation=(IDS, FIRST))


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def case(request, tmp_path_factory):
    given = given_of(request.param, tmp_path_factory.mktemp(request.param))
    model = load_model(given.files.verify(), "float32", "cpu")
    return given, model, ffns_of(given.files, given.moments)


def hidden_of(model, ffn: Ffn) -> torch.Tensor:
    """(tokens, f), float64: what the last matrix of an FFN is given."""
    seen = []
    handle = model.get_submodule(ffn.down.module).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2).double()


def test_concentration_is_that_of_contributions_written_out(case):
    given, model, ffns = case
    rows = concentration(model, ffns, IDS, 0.25)
    for ffn in ffns:
        h, weight = hidden_of(model, ffn), given.files.weight(ffn.down)
        squares = {"act": h.square(), "act_x_row": (h[:, :, None] * weight.T).square().sum(2)}
        for criterion, own in squares.items():
            (row,) = [r for r in rows if (r["layer"], r["criterion"]) == (ffn.down.layer, criterion)]
            heavy = ffn.top(criterion, 0.25)
            assert len(heavy) == round(0.25 * h.shape[1])
            assert row["held_elsewhere"] == pytest.approx(float(own[:, heavy].sum() / own.sum()), rel=1e-5)
            assert row["per_token"] == pytest.approx(float((own[:, heavy].sum(1) / own.sum(1)).mean()), rel=1e-5)
            best = own.sort(1, descending=True).values[:, : len(heavy)]
            assert row["per_token_best"] == pytest.approx(float((best.sum(1) / own.sum(1)).mean()), rel=1e-5)
            there = set(own.sum(0).sort(descending=True).indices[: len(heavy)].tolist())
            assert row["same"] == len(there & set(heavy.tolist())) / len(heavy)
            assert row["per_token_best"] >= row["per_token"]
            scores = ffn.scores[criterion]
            assert row["held"] == pytest.approx(float(scores[heavy].sum() / scores.sum()))
        columns = [(m, given.files.weight(m)) for m in ffn.group[:-1]]
        norms = weight.square().sum(0) + sum(w.square().sum(1).view(-1, h.shape[1]).sum(0) for _, w in columns)
        torch.testing.assert_close(ffn.scores["weight_norm"], norms)


def test_a_zeroed_neuron_is_one_whose_row_of_v_is_zero(case):
    _, model, ffns = case
    chosen = {ffn.down.module: ffn.top("act", 0.03) for ffn in ffns}
    edited = copy.deepcopy(model)
    for ffn in ffns:
        weight = edited.get_submodule(ffn.down.module).weight.data
        index = (chosen[ffn.down.module],) if ffn.down.transposed else (slice(None), chosen[ffn.down.module])
        weight[index] = 0
    with zeroed(model, chosen):
        without = loss(model, IDS, FIRST)["nll"]
    assert without == pytest.approx(loss(edited, IDS, FIRST)["nll"], abs=1e-3)
    assert without != pytest.approx(loss(model, IDS, FIRST)["nll"], abs=1e-3)
    assert count_of(96, 0.03) == 3
    assert count_of(10, 0.03) == 1


def test_a_trial_stores_what_it_says_and_is_dense_where_nothing_is_left_out(case, monkeypatch):
    given, model, ffns = case
    with torch.no_grad():
        dense = model(input_ids=IDS, use_cache=False).logits
    trial = Trial.of(given.files, given.moments, ffsplit.split_of(), "cpu")
    sizes = trial.of_rank(0.1)
    compressed = trial.model(model, sizes)

    def numbers(of):
        modules = [of.get_submodule(m.module) for ffn in ffns for m in ffn.group]
        return sum(t.numel() for module in modules for t in module.state_dict().values() if t.is_floating_point())

    assert trial.kept(sizes) == pytest.approx(numbers(compressed) / numbers(model))
    assert trial.kept(trial.of_bytes(0.5)) <= 0.5
    with torch.no_grad():
        assert float((compressed(input_ids=IDS, use_cache=False).logits - dense).abs().max()) > 1e-2
    monkeypatch.setattr(Split, "largest", lambda self, group: self.limit(group))  # sizes that store more than dense, too
    everything = Trial.of(given.files, given.moments, ffsplit.split_of(), "cpu")
    with torch.no_grad():
        last = {g.name: g.structure.limit(g.matrices) for g in everything.groups}
        whole = everything.model(model, last)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(whole, dense, atol=2e-4, rtol=1e-3)


def test_numbers_on_the_grid_stay_and_others_move_half_a_step_at_most():
    generator = torch.Generator().manual_seed(5)
    for bits, group in product((2, 3, 4, 8), (None, 32, 5)):
        most, columns = 2 ** (bits - 1) - 1, 70
        width = group or columns
        scale = 2.0 ** torch.randint(-4, 4, (6, -(-columns // width)), generator=generator)
        steps = torch.randint(-most, most + 1, (6, columns), generator=generator)
        steps[:, ::width] = -most  # every scale is used to the end
        scales = scale.repeat_interleave(width, 1)[:, :columns]
        assert torch.equal(rounded(steps * scales, bits, group), steps * scales)
        w = torch.randn(6, columns, generator=generator, dtype=torch.float64)
        blocks = w.split(width, 1)
        largest = torch.cat([b.abs().amax(1, keepdim=True).expand_as(b) for b in blocks], 1)
        error = (rounded(w, bits, group) - w).abs() * most / largest  # in steps
        assert float(error.max()) <= 0.5 + 1e-9
        assert float(error.max()) > 0.4, "nothing was rounded"
        torch.testing.assert_close(rounded(w, bits, group).abs().amax(1), w.abs().amax(1))  # the largest of a row is on the grid
    assert torch.equal(rounded(torch.zeros(2, 40), 4, 32), torch.zeros(2, 40))
    assert rounded(w.half(), 4).dtype == torch.float16
    with pytest.raises(ValueError, match="1 bits"):
        rounded(w, 1)
    assert bits_of((6, 70), 4, 32) == 6 * (70 * 4 + 3 * 16)
    assert bits_of((6, 70), 4) == 6 * (70 * 4 + 16)


def logits_of(model) -> dict[str, list[float]]:
    """In the place of a loss, which hardly feels the FFNs of a model that was never trained: one direction of the logits."""
    direction = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits @ direction
    return {"nll": found.double().sum(1).tolist(), "tokens": [float(IDS.shape[1])] * len(IDS)}


def test_rounding_takes_the_bits_that_it_says_and_with_many_loses_nothing(case):
    """Against a count and a rounding of the same matrices by name; GPT-2's are stored the other way round."""
    given, model, ffns = case
    trial = Trial.of(given.files, given.moments, ffsplit.split_of(), "cpu")
    sizes, dense = trial.of_rank(0.1), logits_of(model)
    rows = quantised_pairs(model, lambda: trial.model(model, sizes), ffns, logits_of, dense)
    split = trial.model(model, sizes)
    shapes = [(m.module, n, p.shape) for f in ffns for m in f.group for n, p in split.get_submodule(m.module).named_parameters()]
    shapes = [(name, shape) for _, name, shape in shapes if len(shape) == 2]
    assert any("light" in name for name, _ in shapes)
    of_dense = [given.files.weight(m).shape for f in ffns for m in f.group]
    numbers = sum(a * b for a, b in of_dense)
    for row in rows:
        width = 32 if "32" in row["scale"] else 10**9
        bits = [row["light_bits"] if "light" in name else row["heavy_bits"] for name, _ in shapes]
        own = sum(a * (b * n + 16 * -(-b // width)) for (_, (a, b)), n in zip(shapes, bits, strict=True))
        alike = sum(a * (b * row["all_bits"] + 16 * -(-b // width)) for a, b in of_dense)
        assert row["split_per_number"] == own / numbers
        assert row["all_per_number"] == alike / numbers
        assert (row["more"] == "all") == (alike >= own)
        assert row["above"] == pytest.approx(row["split_nll"] - row["all_nll"])
        edited = copy.deepcopy(model)
        for m in (m for f in ffns for m in f.group):
            weight = edited.get_submodule(m.module).weight.data
            value = rounded(given.files.weight(m), row["all_bits"], 32 if width == 32 else None).to(weight.dtype)
            weight.copy_(value.T if m.transposed else value)
        assert row["all_nll"] == pytest.approx(paired(logits_of(edited), dense)[0], rel=1e-4)
    assert answered(rows) == (rows[0]["above"], rows[0]["above_se"])
    assert logits_of(model) == dense, "the dense model stays as it was"
    unrounded = paired(logits_of(split), dense)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("winnow.studies.ffsplit.quantised.PAIRS", ((15, 15),))
        (fine, *_) = quantised_pairs(model, lambda: trial.model(model, sizes), ffns, logits_of, dense)
    assert fine["split_nll"] == pytest.approx(unrounded, rel=0.01)
    assert rows[-1]["split_nll"] != pytest.approx(unrounded, rel=0.01), "four bits change something"


def test_sizes_of_bert_by_hand():
    """d = 768, f = 3072: a quarter of the neurons whole, the rest of rank 77 in both matrices; biases count on both sides."""
    found = counted(published("BERT-base"), STRUCTURES.build(ffsplit.split_of()["structure"]), 0.1)
    block = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    saved = 12 * (2 * 768 * 3072 - 2 * (768 * 768 + 77 * (2304 + 768)))
    tables = (30522 + 512 + 2) * 768
    pooler, norm = 768 * 768 + 768, 2 * 768
    assert found["blocks"] == 12 * block
    assert found["whole"] == 12 * block + tables + pooler + norm
    assert found["saved"]["blocks"] == pytest.approx(100 * saved / (12 * block)) == pytest.approx(43.25, abs=0.01)
    assert found["saved"]["whole"] == pytest.approx(33.60, abs=0.01)
    assert found["ffn_share"]["whole"] == pytest.approx(51.76, abs=0.01)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    given = given_of("llama", tmp_path_factory.mktemp("measured"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ffsplit, "TIMED", {"batches": [1], "prompts": [8], "decode": 2, "repeats": 2, "warm_up": 1})
        return STUDY.measure(given)


def evidence(found: dict, losses: dict[tuple[str, str], float], scores: pd.DataFrame | None = None) -> Evidence:
    """Synthetic losses by (method, recovery), equal in all windows but for a ripple that pairing takes out."""
    rows, results = [], {}
    for method, budget, recovery in [("dense", "dense", ffsplit.TUNED), *map(studies.key_of, STUDY.cells)]:
        nll, key = losses.get((method, recovery), 2.0), f"{method}/{budget}/{recovery}"
        results[key] = {"per_window": {"nll": [100 * nll + i for i in range(WINDOWS)], "tokens": [100] * WINDOWS}}
        own = {"keep_bytes": 0.35, "delta_nll": nll, "delta_nll_se": 0.01, "perplexity": 2.718**nll}
        rows.append({"model": "m", "method": method, "budget": budget, "recovery": recovery, "result": key, **own})
    return Evidence(pd.DataFrame(rows), results, {"m": found}, scores)


def verdicts(found, losses=None, scores=None, drawn=lambda frames, names: {}) -> pd.Series:
    with pytest.MonkeyPatch.context() as patch:  # most tests look at no figure
        patch.setattr("winnow.studies.ffsplit.figures.drawn", drawn)
        conclusion = STUDY.conclude(evidence(found, losses or {}, scores))
    assert set(conclusion.tables) == set(STUDY.tables)
    return judge(CLAIMS, conclusion.answers).set_index(["id", "model"])["verdict"]


def test_every_claim_has_a_verdict_and_identities_hold(measured):
    figures = {}
    found = verdicts(measured, drawn=lambda frames, names: figures.update(drawn(frames, names)) or figures)
    assert set(figures) == set(STUDY.figures)
    plt.close("all")
    assert {claim.id for claim in CLAIMS} == set(found.index.get_level_values(0))
    assert max(measured["identities"].values()) < 1e-12
    assert len(measured["identities"]) == 7
    for name in ("BERT-base", "BERT-large", "OPT-6.7B"):
        assert found["ffsplit_size", f"{name}, by its config"] == HOLDS
        assert found["ffsplit_size_whole", f"{name}, by its config"] == IMPOSSIBLE
    assert found["ffsplit_ffn_size", "OPT-6.7B, by its config"] == HOLDS
    assert found["ffsplit_ffn_size", "BERT-base, by its config"] == OTHER
    assert found["ffsplit_glue", "any"] == UNTESTED
    ranks = [row["delta_nll"] for row in measured["sweeps"] if row["sweep"] == "light rank" and row["metric"] == "gram"]
    assert len(ranks) == len(ffsplit.RANKS)
    equal = [row for row in measured["sweeps"] if "bytes" in row["sweep"]]
    assert all(row["keep_bytes"] <= ffsplit.EQUAL for row in equal)
    quarter, *_ = (row["delta_nll"] for row in equal if row["heavy"] == 0.25)
    best = min(row["delta_nll"] for row in equal if row["heavy"] != 0.25)
    assert measured["quarter"][0] == pytest.approx(quarter - best)


def test_verdicts_change_with_the_numbers(measured):
    tuned = ffsplit.TUNED
    better = verdicts(measured, {("split", "none"): 1.5, ("split", tuned): 1.9, ("dense", tuned): 1.9})
    assert better["ffsplit_against_low_rank", "m"] == HOLDS
    assert better["ffsplit_against_slice_tuned", "m"] == HOLDS
    assert better["ffsplit_drop", "m"] == HOLDS
    worse = verdicts(measured, {("split", "none"): 2.5, ("split", tuned): 2.1, ("split_whitened", "none"): 2.1})
    assert {worse[f"ffsplit_{name}", "m"] for name in ("against_low_rank", "against_random_tuned", "drop", "whitened")} == {FAILS}
    concentrated = [{**row, "held": 0.9, "per_token": 0.5, "per_token_best": 0.5} for row in measured["concentration"]]
    spread = [{**row, "held": 0.3, "per_token": 0.2, "per_token_best": 0.5} for row in measured["concentration"]]
    for rows, expected in ((concentrated, HOLDS), (spread, FAILS)):
        found = verdicts({**measured, "concentration": rows})
        assert {found[f"ffsplit_{name}", "m"] for name in ("concentrated", "concentrated_output", "any_token")} == {expected}
    for value, expected in ((0.5, HOLDS), (0.05, UNDECIDED), (-0.5, FAILS)):
        above = {key: [value, 0.05] for key in ("bottom", "random", "weight_norm")}
        found = verdicts({**measured, "zeroed": {**measured["zeroed"], "above": above}, "quarter": [-value, 0.05]})
        names = ("zeroed", "zeroed_random", "zeroed_norm", "quarter")
        assert {found[f"ffsplit_{name}", "m"] for name in names} == {expected}
    timed = [{**row, "ratio": 0.7, "ratio_low": 0.69, "ratio_high": 0.71} for row in measured["latency"]]
    assert {verdicts({**measured, "latency": timed})[f"ffsplit_{name}", "m"] for name in ("speed", "speed_everywhere")} == {HOLDS}
    slow = [{**row, "ratio": 1.1, "ratio_low": 1.09, "ratio_high": 1.11} for row in measured["latency"]]
    assert {verdicts({**measured, "latency": slow})[f"ffsplit_{name}", "m"] for name in ("speed", "speed_everywhere")} == {FAILS}
    for above, expected in ((-0.5, HOLDS), (0.05, UNDECIDED), (0.5, FAILS)):
        own = ("of 32 inputs", 8, 8, "all")  # no other pair counts
        rounded = [
            {**row, "above": above if (row["scale"], row["heavy_bits"], row["light_bits"], row["more"]) == own else -above}
            for row in measured["quantised"]
        ]
        rounded = [{**row, "above_se": 0.04} for row in rounded]
        assert verdicts({**measured, "quantised": rounded})["ffsplit_quantised", "m"] == expected


def test_a_mixture_and_no_model_at_all_are_said_and_not_judged(measured):
    absent = verdicts(
        {"missing": "a mixture of experts", "sizes": {k: v for k, v in measured["sizes"].items() if k != "this model"}}
    )
    assert absent["ffsplit_concentrated", "m"] == UNTESTED
    assert absent["ffsplit_size_whole", "BERT-large, by its config"] == IMPOSSIBLE
    empty = STUDY.conclude(Evidence(pd.DataFrame(), {}, {}))
    assert set(empty.figures) == set(STUDY.figures)
    plt.close("all")
    assert set(judge(CLAIMS, empty.answers)["verdict"]) == {UNTESTED}


def test_scores_of_configured_tasks_answer_the_claim_on_glue(measured):
    own = {"model": "bert", "evaluation": "mrpc", "value": 0.8, "value_se": 0.01, "delta": -0.02, "delta_se": 0.004}
    cells = [("dense", "none", None), ("split", "none", None), ("split", "again", -0.005)]
    rows = [
        {**own, "method": method, "recovery": recovery, "measure": measure, "delta_control": control, "delta_control_se": 0.002}
        for method, recovery, control in cells
        for measure in ("accuracy", "loss")
    ]
    assert verdicts(measured, scores=pd.DataFrame(rows))["ffsplit_glue", "bert, mrpc"] == HOLDS
    rows[-2]["delta_control"] = -0.05
    assert verdicts(measured, scores=pd.DataFrame(rows))["ffsplit_glue", "bert, mrpc"] == FAILS
    assert verdicts(measured, scores=pd.DataFrame(rows[:-2]))["ffsplit_glue", "bert, mrpc"] == UNTESTED
