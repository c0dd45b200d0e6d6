"""Recovery in the real workflow: recovered checkpoints are evaluated, the dense model with the same recovery stands beside them,
and a changed option plans recoveries and evaluations only."""

import json
from collections import Counter

import pandas as pd
import pytest

from tests.workflow.test_end_to_end import Workspace
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import MANIFEST, Bundle

pytestmark = [pytest.mark.workflow, pytest.mark.slow]  # two dozen jobs
AGGREGATION = {"cards": 1, "tables": 1, "figures": 1, "report": 1, "all": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workflow"))
    short = {"steps": 4, "batch": 2, "every": 2}
    workspace.config["calibrations"]["few"]["windows"] = 16
    workspace.config["recoveries"] = {
        "none": {"kind": "none"},
        "refine": {"kind": "refine", **short},
        "text": {"kind": "distill", "nll": 1.0, **short},
        "weighted": {"kind": "sequential", "objective": "shifted", "outputs": "gradient"},
    }
    workspace.config["experiments"]["one"] |= {
        "methods": ["whitened"],
        "budgets": ["ffn-0.5"],
        "recoveries": ["none", "refine", "text", "weighted"],
        "export": "dense",
    }
    done = workspace.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def test_every_recovered_row_has_its_control(finished):
    table = pd.read_csv(finished.folder / "results" / "tables" / "summary.csv")
    rows = {(row["method"], row["recovery"]): row for _, row in table.iterrows()}
    recoveries = ("none", "refine", "text", "weighted")
    assert set(rows) == {(method, recovery) for method in ("dense", "whitened") for recovery in recoveries}
    assert len(rows) == len(table)
    assert rows["dense", "refine"]["delta_nll"] == 0, "a block that is the dense one has nothing to learn"
    assert rows["dense", "text"]["delta_nll"] != 0
    assert (rows["dense", "text"][["keep_bytes", "dense_bytes"]] == rows["dense", "none"][["keep_bytes", "dense_bytes"]]).all()
    stored = {rows["whitened", recovery]["model_stored_bytes"] for recovery in recoveries[:3]}
    assert len(stored) == 1
    losses = {rows["whitened", recovery]["nll"] for recovery in recoveries[:3]}
    assert len(losses) == 3, "what is evaluated is what was recovered"
    page = (finished.folder / "results" / "report.html").read_text()
    assert "Dense after the recovery text on few" in page
    for (_, recovery), row in rows.items():
        name = f"/{recovery}-"
        assert (name in row["checkpoint"]) == (recovery != "none")


def test_cards_and_exports_are_of_what_was_recovered(finished):
    results = finished.folder / "results"
    (card,) = results.glob("pico-*/few-*/whitened-*/ffn-0.5-*/refine-*/README.md")
    assert "| recovery, on the calibration windows | `refine` (batch 2, code_rate 0.005, every 2" in card.read_text()
    (plain,) = results.glob("pico-*/few-*/whitened-*/ffn-0.5-*/none-*/README.md")
    assert "recovery, on" not in plain.read_text()
    export = Bundle(card.parent / "dense_export" / MANIFEST).verify()
    recovered = Bundle(card.parent / "checkpoint" / MANIFEST).verify()
    report = json.loads((recovered / "recovery.json").read_text())
    assert set(report["blocks"]) == {"model.layers.0", "model.layers.1"}
    models = [load_model(folder, "float32", "cpu") for folder in (export, recovered)]
    ids = models[0].dummy_inputs["input_ids"]
    a, b = (model(input_ids=ids).logits for model in models)
    assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def test_gradients_are_collected_for_the_recovery_that_reads_them(finished):
    (made,) = (finished.folder / "results").glob("pico-*/few-*/whitened-*/ffn-0.5-*/weighted-*/checkpoint/recovery.json")
    found = json.loads(made.read_text())["divergence"]
    assert 0 < found["held_out_best"] <= found["held_out_start"]
    own = finished.config["recoveries"].pop("weighted")
    finished.config["experiments"]["one"]["recoveries"].remove("weighted")
    assert finished.planned("--forceall")["collect_gradients"] == 0
    finished.config["recoveries"]["weighted"] = own
    finished.config["experiments"]["one"]["recoveries"].append("weighted")
    assert finished.planned("--forceall")["collect_gradients"] == 1


def test_a_changed_option_plans_its_recoveries_and_evaluations_only(finished):
    assert finished.planned() == Counter()
    finished.config["recoveries"]["refine"]["rate"] = 1e-4
    own = {"recover": 1, "recover_dense": 1, "evaluate_perplexity": 1, "evaluate_perplexity_healed": 1}
    assert finished.planned() == Counter({**own, "export_dense_recovered": 1, **AGGREGATION})
    finished.config["recoveries"]["refine"]["rate"] = 1e-3


def test_the_plan_counts_recoveries(finished, tmp_path):
    fresh = Workspace(tmp_path)
    fresh.config = {**finished.config, "models": {"pico": {"source": str(fresh.folder / "model"), "shards": 2}}}
    done = fresh.run("plan")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("│")}
    assert {"recover", "recover_dense", "evaluate_perplexity_healed"} <= set(rows)
