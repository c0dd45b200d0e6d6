"""What a configuration with an accuracy evaluation plans, beside one without."""

import json
from collections import Counter

import pytest

from tests.workflow.test_end_to_end import KEEPS, Workspace

pytestmark = pytest.mark.workflow


def test_accuracy_plans_its_own_jobs_and_table_and_adds_none_to_the_others(tmp_path):
    workspace = Workspace(tmp_path)
    before = workspace.planned()
    row = {"activity_label": "a", "ctx": "b", "endings": ["c", "d", "e", "f"], "label": 0}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    files = {"hellaswag": {"validation": [str(tmp_path / "rows.jsonl")]}}
    workspace.config["evaluations"]["tasks"] = {"kind": "accuracy", "tasks": ["hellaswag"], "files": files}
    assert workspace.planned() == before, "an evaluation that no experiment names"
    workspace.config["experiments"]["one"]["evaluations"].append("tasks")
    cells = 2 * len(KEEPS)
    added = Counter(retrieve_tasks=1, evaluate_accuracy_dense=1, evaluate_accuracy=cells, tabulate_accuracy=1)
    assert workspace.planned() == before + added
    only = workspace.planned("accuracy")
    assert set(added) <= set(only)
    assert not {"evaluate_perplexity", "evaluate_dense", "check_overlap", "tables"} & set(only)
    perplexity = workspace.planned("perplexity")
    assert not set(added) & set(perplexity)
    assert workspace.planned("prefetch")["retrieve_tasks"] == 1
    workspace.config["experiments"]["one"]["evaluations"] = ["tasks"]
    alone = workspace.planned()
    assert set(added) <= set(alone)
    assert not {"tables", "figures", "report", "evaluate_dense"} & set(alone)
    (tmp_path / "rows.jsonl").unlink()
    done = workspace.run("-n")
    assert done.returncode != 0
    assert f"winnow: evaluations.tasks: {tmp_path / 'rows.jsonl'}: there is no such file" in done.stderr
