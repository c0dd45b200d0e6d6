"""Fine-tune, compress, fine-tune again in the real workflow, on a made-up task and a tiny BERT."""

from collections import Counter

import pandas as pd
import pytest

from tests.unit.reviews import rows, write_bert, write_rows
from tests.workflow.test_end_to_end import Workspace, refused

pytestmark = pytest.mark.workflow
METHODS = {
    "whitened": {"structure": {"kind": "low_rank"}, "metric": {"kind": "gram"}},
    "ffsplit": {"structure": {"kind": "split", "exact": 0.25}, "metric": {"kind": "weights"}},
}


class Reviews(Workspace):
    """As the other workspace, with a task, a model that is tuned on it first, and the recovery that tunes it again."""

    def __init__(self, folder):
        super().__init__(folder)
        write_bert(folder / "bert")
        train = rows(500, 0)
        test = [row for row in rows(300, 1) if row["sentence"] not in {r["sentence"] for r in train}]
        task = {"kind": "classification", "columns": ["sentence"], "length": 24}
        files = {name: [write_rows(folder / f"{name}.jsonl", part)] for name, part in (("train", train), ("test", test))}
        self.config = {
            "models": {"tiny": {"source": "bert", "finetune": {"task": "reviews", "steps": 100, "rate": 0.002}}},
            "texts": {},
            "calibrations": {"rows": {"task": "reviews", "windows": 200}},
            "methods": METHODS,
            "budgets": {"ffn-0.4": {"targets": ["ffn"], "keep_bytes": 0.4}},
            "recoveries": {
                "none": {"kind": "none"},
                "again": {"kind": "finetune", "task": "reviews", "steps": 20, "rate": 0.001},
            },
            "evaluations": {"reviews": {**task, **files}},
            "experiments": {
                "one": {
                    "models": ["tiny"],
                    "calibrations": ["rows"],
                    "methods": list(METHODS),
                    "budgets": ["ffn-0.4"],
                    "recoveries": ["none", "again"],
                    "evaluations": ["reviews"],
                    "controls": False,
                }
            },
        }


def test_a_task_plans_its_own_jobs_and_prefetch_trains_nothing(tmp_path):
    workspace = Reviews(tmp_path)
    planned = workspace.planned()
    tuning = Counter(retrieve_base=1, finetune=1, retrieve_model=1, recover=2, recover_dense=1)
    scored = Counter(evaluate_classification=4, evaluate_classification_dense=1, evaluate_classification_healed=1)
    rows_of = Counter(retrieve_examples=1, tokenize_rows=1, tabulate_classification=1)
    compressed = Counter(collect_statistics=1, factorize=2, measure_spectra=2, compress=2, all=1)
    assert planned == tuning + scored + rows_of + compressed
    assert workspace.planned("prefetch") == Counter(retrieve_base=1, retrieve_examples=1, prefetch=1)
    (tmp_path / "test.jsonl").unlink()
    assert f"evaluations.reviews: {tmp_path / 'test.jsonl'}: there is no such file" in workspace.run("-n").stderr


def test_a_row_in_both_splits_stops_the_run(tmp_path):
    workspace = Reviews(tmp_path)
    train = rows(500, 0)
    write_rows(tmp_path / "test.jsonl", [*rows(5, 1), train[7]])
    assert "row 7 of train is also row 5 of test" in refused(workspace, "--until", "retrieve_examples")


@pytest.mark.slow
def test_tuned_compressed_and_tuned_again(tmp_path):
    workspace = Reviews(tmp_path)
    done = workspace.run()
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "results" / "tables" / "classification.csv")
    accuracy = table[table["measure"] == "accuracy"].set_index(["method", "recovery"])
    assert len(accuracy) == 2 + 2 * 2
    assert accuracy.loc[("dense", "none"), "value"] > 0.85
    assert (accuracy["value_se"] < 0.03).all()
    for method in METHODS:
        assert abs(accuracy.loc[(method, "again"), "keep_bytes"] - 0.4) < 0.02
        assert accuracy.loc[(method, "again"), "value"] > 0.85
        assert pd.notna(accuracy.loc[(method, "again"), "delta_control_se"])
        assert accuracy.loc[(method, "none"), "stored_bytes"] == accuracy.loc[(method, "again"), "stored_bytes"]
    assert workspace.planned() == Counter()
    workspace.config["recoveries"]["again"]["steps"] = 21
    again = Counter(recover=2, recover_dense=1, evaluate_classification=2, evaluate_classification_healed=1)
    assert workspace.planned() == again + Counter(tabulate_classification=1, all=1)
    workspace.config["recoveries"]["again"]["steps"] = 20
    workspace.config["evaluations"]["reviews"]["limit"] = 50
    scored = Counter(evaluate_classification=4, evaluate_classification_dense=1, evaluate_classification_healed=1)
    assert workspace.planned() == scored + Counter(tabulate_classification=1, all=1), "how it is scored trains nothing anew"
