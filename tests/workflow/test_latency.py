"""Latency through the workflow: a table of its own, facts of the machine outside of the parameters, and nothing planned twice."""

import json
from collections import Counter

import pandas as pd
import pytest

from tests.workflow.test_end_to_end import Workspace

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_latency_is_measured_beside_dense_and_enters_no_other_table(tmp_path):
    workspace = Workspace(tmp_path)
    speed = {"kind": "latency", "batches": [1, 2], "prompts": [8], "decode": 2, "repeats": 6, "warm_up": 1}
    workspace.config["evaluations"] = {"speed": speed}
    workspace.config["experiments"]["one"] |= {"methods": ["svd"], "budgets": ["ffn-0.5"], "evaluations": ["speed"]}
    assert workspace.planned("latency")["evaluate_latency"] == 1
    done = workspace.run()  # the default target: where latency alone is measured, its table is the outcome
    assert done.returncode == 0, done.stdout + done.stderr
    tables = tmp_path / "results" / "tables"
    assert sorted(p.name for p in tables.iterdir()) == ["latency.csv", "latency.parquet"]
    table = pd.read_csv(tables / "latency.csv")
    assert Counter(table["method"]) == {"dense": 4, "svd": 4}
    assert set(table["phase"]) == {"prefill", "decode"}
    assert (table["ratio_q1"] <= table["ratio"]).all()
    assert (table["ratio"] <= table["ratio_q3"]).all()
    svd = table[table["method"] == "svd"]
    assert (svd["weight_bytes_per_token"] < svd["dense_weight_bytes_per_token"]).all()
    assert (svd["flops_per_token"] < svd["dense_flops_per_token"]).all()
    assert (svd["peak_bytes"] < svd["dense_peak_bytes"]).all()
    (path,) = (tmp_path / "results").glob("pico-*/few-*/svd-*/ffn-0.5-*/none-*/speed-*.json")
    record = json.loads(path.read_text())
    assert record["machine"]["clock"] == "perf_counter"
    assert set(record["provenance"]["params"]["spec"]) == {*speed, "name", "dtype", "recovery"}
    assert workspace.planned() == Counter()
    workspace.config["evaluations"]["speed"]["decode"] = 3
    assert workspace.planned() == {"evaluate_latency": 1, "evaluate_latency_dense": 1, "tabulate_latency": 1, "all": 1}
