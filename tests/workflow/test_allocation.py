"""Budgets that are allocated by predicted loss: which jobs they ask for, and that uniform ones do not."""

import json
from collections import Counter

import pytest

from tests.workflow.test_end_to_end import Workspace

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
PREDICTING = ("collect_gradients", "predict_losses", "predict_in_rounds")


def test_predicted_losses_are_made_for_the_budgets_that_read_them(tmp_path):
    place = Workspace(tmp_path)
    one = place.config["experiments"]["one"]
    one |= {"methods": ["whitened"], "budgets": ["ffn-0.8"]}
    assert not set(place.planned()) & set(PREDICTING), "a uniform budget asks for no backward pass"
    place.config["budgets"]["ilp"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": {"kind": "ilp"}}
    one["budgets"] = ["ffn-0.8", "ilp"]
    planned = place.planned()
    assert {rule: planned[rule] for rule in PREDICTING} == dict.fromkeys(PREDICTING[:2], 1) | {"predict_in_rounds": 0}
    place.config["budgets"]["rounds"] = {**place.config["budgets"]["ilp"], "allocation": {"kind": "ilp", "rounds": 1}}
    one["budgets"] = ["ffn-0.8", "ilp", "rounds"]
    done = place.run("--quiet", "rules", "host", "reason")
    assert done.returncode == 0, done.stderr
    assert place.planned() == Counter()
    folder = next((tmp_path / "results").glob("pico-*/few-*/whitened-*"))
    assert (folder / "predicted.parquet").is_file()
    own = next(folder.glob("rounds-*"))
    assert (own / "predicted.parquet").is_file()
    records = json.loads((own / "rounds.json").read_text())["rounds"]
    assert [record["round"] for record in records] == [0, 1]
    assert sum(record["chosen"] for record in records) == 1
    for label in ("ilp", "rounds"):
        found = json.loads((next(folder.glob(f"{label}-*")) / "allocation.json").read_text())
        assert found["status"] == "optimal"
        assert found["bound"] <= found["value"] == pytest.approx(found["predicted"])
        assert 0.795 <= found["keep_bytes"] <= 0.8
    place.config["budgets"]["ilp"]["allocation"] = {"kind": "ilp", "gap": 0.001}
    planned = place.planned()
    assert (planned["compress"], planned["predict_losses"], planned["predict_in_rounds"]) == (1, 0, 0)
