"""HellaSwag on the dense demo model and two compressed ones through the workflow, beside lm-eval's own program."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT, SHARED

ROWS = SHARED / "data" / "hellaswag-val.jsonl"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.workflow,
    pytest.mark.skipif(not ROWS.is_file(), reason="no shared data beside the checkout"),
]
DEFINITION = f"""
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {ROWS}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function asks.process
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
CODE = """
from lm_eval.tasks.hellaswag.utils import preprocess


def process(rows):
    ask = lambda row: preprocess(row["activity_label"] + ": " + row["ctx"])
    return rows.map(lambda row: {"query": ask(row), "choices": [preprocess(ending) for ending in row["endings"]]})
"""


def run(command, folder):
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_hellaswag_through_the_workflow_is_that_of_the_program(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "resources").symlink_to(ROOT / "resources")
    study = yaml.safe_load((tmp_path / "config" / "studies" / "accuracy.yaml").read_text())
    study["evaluations"]["hellaswag"]["files"] = {"hellaswag": {"validation": [str(ROWS)]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "snakemake", "accuracy", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    command += ["--configfile", "study.yaml"]
    run(command, tmp_path)
    table = pd.read_csv(tmp_path / "results" / "tables" / "accuracy.csv")
    assert table["method"].tolist() == ["dense"] * 2 + ["svd"] * 2 + ["whitened"] * 2
    assert table["measure"].tolist() == ["acc", "acc_norm"] * 3
    assert (table["documents"] == 100).all()
    assert (table.loc[table["method"] != "dense", "delta_se"] > 0).all()
    assert "Nothing to be done" in run([*command, "-n"], tmp_path)

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(DEFINITION)
    (tmp_path / "tasks" / "asks.py").write_text(CODE)
    program = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "ours", "--limit", "100"]
    program += ["--model_args", "pretrained=resources/models/demo,dtype=float32", "--include_path", "tasks"]
    run([*program, "--output_path", "printed"], tmp_path)
    (printed,) = (tmp_path / "printed").rglob("results_*.json")
    expected = json.loads(printed.read_text())["results"]["ours"]
    for _, row in table[table["method"] == "dense"].iterrows():
        assert row["value"] == pytest.approx(expected[f"{row['measure']},none"], abs=1e-4)
        assert row["value_se"] == pytest.approx(expected[f"{row['measure']}_stderr,none"], abs=1e-4)
