"""Verdicts follow from numbers, and what the studies measure from a few lines of algebra."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests.conftest import ROOT
from winnow.errors import InputError
from winnow.models.architectures import Matrix, moments_file
from winnow.planning.config import Budget, Method
from winnow.recovery.base import recovery_of
from winnow.studies import base as studies
from winnow.studies.base import Evidence, Given
from winnow.studies.claims import FAILS, HOLDS, IMPOSSIBLE, OTHER, UNDECIDED, UNTESTED, Answer, Claim, judge, read_claims, verdict

CLAIMS = read_claims(ROOT / "resources" / "claims.yaml")
WINDOWS = 8


def claim(check: dict, number: float | None = None) -> Claim:
    known = {"id": "a", "study": "s", "where": "w", "says": "x", "measured": "m"}
    return Claim.model_validate({**known, "number": number, "check": check})


NUMBER = {"kind": "number", "tolerance": 1, "side": "above"}
CASES = [
    (NUMBER, 10, Answer(10.5), HOLDS),
    (NUMBER, 10, Answer(12, 0.6), HOLDS),
    (NUMBER, 10, Answer(30, 0.6), OTHER),
    (NUMBER, 10, Answer(-3, 0.6), FAILS),
    (NUMBER, 10, Answer(0.5, 0.6), UNDECIDED),
    (NUMBER, 10, Answer(0.5, 0.01), FAILS),  # certain, and next to nothing of what is claimed
    (NUMBER, 10, Answer(0.5), FAILS),
    (NUMBER, 10, Answer(0.99, 0.1), UNDECIDED),  # a tenth of it, or not
    (NUMBER, 10, Answer(10, 1.2), HOLDS),
    (NUMBER, 10, Answer(10, 1.3), UNDECIDED),  # too coarse: two standard errors are more than a quarter of 10
    ({"kind": "number", "tolerance": 1, "side": "below"}, -10, Answer(-30), OTHER),
    ({"kind": "number", "tolerance": 1}, 10, Answer(12), FAILS),
    ({"kind": "bound", "most": 0}, None, Answer(-0.3, 0.1), HOLDS),
    ({"kind": "bound", "most": 0}, None, Answer(-0.1, 0.1), UNDECIDED),
    ({"kind": "bound", "most": 0}, None, Answer(0.1, 0.1), UNDECIDED),
    ({"kind": "bound", "most": 0}, None, Answer(0.3, 0.1), FAILS),
    ({"kind": "bound", "most": 0}, None, Answer(0.0), HOLDS),
    ({"kind": "bound", "least": 1, "most": 2}, None, Answer(1.5), HOLDS),
    ({"kind": "bound", "least": 1, "most": 2}, None, Answer(2.5), FAILS),
    ({"kind": "reachable"}, 18, Answer(low=0, high=16.7), IMPOSSIBLE),
    ({"kind": "reachable"}, 16, Answer(low=0, high=16.7), HOLDS),
    ({"kind": "untestable", "reason": "no GPU"}, None, Answer(), UNTESTED),
    (NUMBER, 10, Answer(missing="no such matrix"), UNTESTED),
]


@pytest.mark.parametrize(("check", "number", "answer", "expected"), CASES)
def test_a_verdict_follows_from_rule_and_number(check, number, answer, expected):
    assert verdict(claim(check, number), answer) == expected


def test_every_claim_needs_an_answer_of_its_kind():
    with pytest.raises(InputError, match="a: the study has no answer"):
        judge([claim(NUMBER, 10)], {})
    with pytest.raises(InputError, match="a: its rule needs a measured number"):
        judge([claim(NUMBER, 10)], {"a": {"m": Answer(low=1, high=2)}})
    with pytest.raises(InputError, match="needs a possible range"):
        judge([claim({"kind": "reachable"}, 10)], {"a": {"m": Answer(3.0)}})


def test_claims_twice_or_not_whole_are_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    one = "- {id: a, study: s, where: w, says: x, measured: m, check: {kind: bound, most: 0}}\n"
    path.write_text(one + one)
    with pytest.raises(InputError, match="duplicate claim a"):
        read_claims(path)
    path.write_text(one.replace("most", "moist"))
    with pytest.raises(InputError, match="moist"):
        read_claims(path)


@pytest.mark.parametrize("name", list(studies.STUDIES))
def test_studies_have_valid_presets_and_claims(name):
    study = studies.study_of(name)
    for content in study.methods.values():
        Method.model_validate(content)
    for content in study.budgets.values():
        Budget.model_validate(content)
    for content in study.recoveries.values():
        recovery_of(content)
    assert len({*study.methods, *study.budgets, *study.recoveries}) == sum(
        map(len, (study.methods, study.budgets, study.recoveries))
    )
    for method, budget, recovery in map(studies.key_of, study.cells):
        assert method in study.methods
        assert budget in study.budgets
        assert recovery in {studies.NONE, *study.recoveries}
    assert any(c.study == name for c in CLAIMS)
    assert {c.study for c in CLAIMS} <= set(list(studies.STUDIES))


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


D, LAYERS = 16, 3
WEIGHTS = [randn(D, D, seed=i) for i in range(LAYERS)]
INPUTS = [torch.logspace(-1, 1, D, dtype=torch.float64)[:, None] * randn(D, 64, seed=50 + i) for i in range(LAYERS)]


@pytest.fixture(scope="module")
def coupling() -> dict:
    group = [Matrix(i, "o_proj", f"layers.{i}.o_proj", "attention_output", (D, D), False, False) for i in range(LAYERS)]
    files = SimpleNamespace(matrices=group, weight=lambda m: WEIGHTS[m.layer])
    grams = {moments_file(i): {"attention_output.gram": x @ x.T / x.shape[1]} for i, x in enumerate(INPUTS)}
    return studies.study_of("coupling").measure(Given(files, "float32", "cpu", SimpleNamespace(tensors=grams.get)))


def test_coupling_measures_what_algebra_says(coupling):
    total = sum(float(w.square().sum()) for w in WEIGHTS)
    beyond = sum(float(torch.linalg.svdvals(w)[4:].square().sum()) for w in WEIGHTS)
    assert coupling["errors"]["SVD"]["weights"] == pytest.approx(beyond / total)
    best = sum(float(torch.linalg.svdvals(w @ x)[4:].square().sum()) for w, x in zip(WEIGHTS, INPUTS, strict=True))
    whole = sum(float((w @ x).square().sum()) for w, x in zip(WEIGHTS, INPUTS, strict=True))
    assert coupling["errors"]["SVD-LLM"]["outputs"] == pytest.approx(best / whole)
    assert all(row["weights"] >= beyond / total - 1e-12 for row in coupling["errors"].values()), "Eckart and Young"
    assert all(row["outputs"] >= best / whole - 1e-12 for row in coupling["errors"].values())
    errors = [row["error"] for row in coupling["sweep"]]
    assert errors[0] == min(errors)
    assert errors[-1] == pytest.approx(coupling["anchors_error"], rel=1e-4)
    assert coupling["tying"]["free"] <= coupling["tying"]["pairs"] + 1e-9 <= coupling["tying"]["one section"] + 2e-9
    assert coupling["stored"] == {"coupled": (4 * 4 * D + 3 * 16) / (3 * D * D), "SVD-LLM": 0.5}
    *exact, excess = coupling["identities"].values()
    assert max(exact) < 1e-12
    assert excess <= 1e-12


def evidence(found: dict, losses: dict[tuple[str, str], float]) -> Evidence:
    """Synthetic losses, equal in all windows but for a ripple that pairing takes out."""
    study, rows, results = studies.study_of("coupling"), [], {}
    for method, budget in product(study.methods, study.budgets):
        nll, key = losses.get((method, budget), 2.0), f"{method}/{budget}"
        results[key] = {"per_window": {"nll": [100 * nll + i for i in range(WINDOWS)], "tokens": [100] * WINDOWS}}
        own = {"keep_bytes": 0.35, "delta_nll": nll, "delta_nll_se": 0.01, "perplexity": 2.718**nll}
        rows.append({"model": "m", "method": method, "budget": budget, "recovery": "none", "result": key, **own})
    return Evidence(pd.DataFrame(rows), results, {"m": found})


def test_verdicts_on_coupling_change_with_the_numbers(coupling):
    study, own = studies.study_of("coupling"), [c for c in CLAIMS if c.study == "coupling"]

    def verdicts(found, losses):
        conclusion = study.conclude(evidence(found, losses))
        assert set(conclusion.tables) == set(study.tables)
        assert set(conclusion.figures) == set(study.figures)
        return judge(own, conclusion.answers).set_index("id")["verdict"]

    worse = verdicts(coupling, {("coupled", "o-rank-0.25"): 3.154})
    assert worse["coupling_loss"] == HOLDS
    assert worse["coupling_against_svd"] == FAILS
    assert worse["coupling_bytes"] == FAILS
    assert worse["coupling_rate"] == HOLDS
    assert worse["coupling_optimum"] == HOLDS
    assert worse["coupling_metric"] == HOLDS
    better = verdicts(coupling, {("coupled", "o-rank-0.25"): 1.5})
    assert better["coupling_loss"] == FAILS
    assert better["coupling_metric"] == FAILS
    slow = [{**row, "distance": 1 / (1 + row["lambda"]) ** 0.5, "error": row["lambda"]} for row in coupling["sweep"]]
    other = verdicts({**coupling, "sweep": [*slow[:1], {**slow[1], "error": -1.0}, *slow[2:]]}, {})
    assert other["coupling_rate"] == OTHER
    assert other["coupling_optimum"] == FAILS
    absent = verdicts({"missing": "o_proj is 8 x 16"}, {})
    assert absent["coupling_rate"] == UNTESTED


@pytest.mark.parametrize(("lost", "expected"), [(132, HOLDS), (50, OTHER), (-10, FAILS), (None, UNTESTED)])
def test_the_verdict_on_hellaswag_is_of_paired_documents(coupling, lost, expected):
    """Of 1,000 documents, so many more are wrong for coupled sections than for whitened SVD."""
    given, cells = evidence(coupling, {}), {("coupled", "o-rank-0.25"): 600 - (lost or 0), ("whitened", "o-rank-0.25"): 600}
    cells |= {("whitened", "o-0.344"): 600, ("dense", "dense"): 700}
    scored = []
    for (method, budget), right in cells.items() if lost is not None else ():
        path = f"{method}/{budget}/accuracy"
        own = [float(i < right) for i in range(1000)]
        given.results[path] = {"scores": {"hellaswag": {"acc_norm": {"per_document": own}}}}
        scored.append({"model": "m", "evaluation": "hs", "method": method, "budget": budget, "result": path})
    answers = studies.study_of("coupling").conclude(replace(given, scored=scored)).answers
    for name in ("coupling_hellaswag", "coupling_hellaswag_equal_bytes"):
        (claim,) = (c for c in CLAIMS if c.id == name)
        ((place, answer),) = answers[name].items()
        assert verdict(claim, answer) == expected
        if lost is not None:
            assert place == "m, hs"
            assert answer.value == pytest.approx(-lost / 10)
            spread = sum((float(600 - max(lost, 0) <= i < 600 + max(-lost, 0)) - abs(lost) / 1000) ** 2 for i in range(1000))
            assert answer.error == pytest.approx(100 * (spread / 999 / 1000) ** 0.5)
