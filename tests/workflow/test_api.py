"""The Python functions give the numbers of the workflow, which knows the recommended preset by its name."""

import subprocess
import sys

import pytest

import winnow
from tests.conftest import ROOT
from tests.workflow.test_end_to_end import Workspace
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import read_json, read_tensors
from winnow.planning.preview import jobs_of

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def recommended(tmp_path_factory) -> Workspace:
    """A run of `winnow` and its factored sibling, in a folder of its own, with a configuration that does not define them."""
    place = Workspace(tmp_path_factory.mktemp("recommended"))
    del place.config["methods"]
    place.config["budgets"] = {"all-0.4": {"targets": ["ffn", "attention"], "keep_bytes": 0.4}}
    place.config["experiments"]["one"] |= {"methods": ["winnow", "winnow_factored"], "budgets": ["all-0.4"]}
    done = place.run()
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("method", ["winnow", "winnow_factored"])
def test_loss_and_bytes_are_those_of_the_workflow(recommended, method):
    (model,) = (recommended.folder / "results").glob("pico-*")
    calibration, evaluation = (read_tensors(next(model.glob(f"tokens/{name}-*")), sealed=True)[0] for name in ("few", "short"))
    made = winnow.compress(recommended.folder / "model", calibration["ids"], method, 0.4)
    dense = load_model(recommended.folder / "model", "float32", "cpu")
    found = winnow.evaluate(made.model, evaluation["ids"], dense, first=evaluation["first"])
    (cell,) = model.glob(f"few-*/{method}-*/all-0.4-*")
    expected, allocation = read_json(next(cell.glob("none-*/short-*.json"))), read_json(cell / "allocation.json")
    assert found["per_window"] == expected["per_window"]
    assert {key: found[key] for key in ("nll", "delta_nll", "delta_nll_se", "kl")} == {
        key: expected[key] for key in ("nll", "delta_nll", "delta_nll_se", "kl")
    }
    assert made.report.stored_bytes == expected["stored_bytes"] == allocation["stored_bytes"]
    assert made.report.predicted == pytest.approx(allocation["predicted"], rel=1e-9)
    assert [(row["group"], row["size"]) for row in made.report.groups] == [
        (row["group"], row["size"]) for row in allocation["groups"]
    ]


def test_what_is_saved_is_the_workflows_checkpoint(recommended, tmp_path):
    (model,) = (recommended.folder / "results").glob("pico-*")
    windows = read_tensors(next(model.glob("tokens/few-*")), sealed=True)[0]["ids"]
    saved = winnow.compress(recommended.folder / "model", windows, "winnow", 0.4).save(tmp_path / "checkpoint")
    (expected,) = model.glob("few-*/winnow-*/all-0.4-*/checkpoint")
    for path in (*expected.glob("*.safetensors"), expected / "config.json", expected / "tokenizer.json"):
        assert (saved / path.name).read_bytes() == path.read_bytes(), path.name


def test_in_another_folder_a_file_of_ones_own_adds_to_the_default(tmp_path):
    """Its relative paths are of the checkout; the demo's cells are planned from there."""
    (tmp_path / "mine.yaml").write_text("experiments: {demo: {methods: [svd, winnow], budgets: [all-0.4]}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "-n", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=Workspace.environment())
    assert done.returncode == 0, done.stderr
    assert jobs_of(done.stdout + done.stderr)["compress"] == 2
