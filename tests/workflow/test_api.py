"""The Python functions give the numbers of the workflow, which knows the recommended preset by its name."""

import subprocess
import sys

import pytest

import winnow
from tests.conftest import ROOT
from tests.dry_runs import dry_run
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
    check_equal(recommended.folder / "model", model, "few", "short", method, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["winnow", "svd_llm_v2_steep"])
def test_so_they_are_on_the_demo(tmp_path, method):
    own = f"experiments: {{demo: {{methods: [{method}], budgets: [all-0.2]}}}}\n"
    (tmp_path / "mine.yaml").write_text(own, encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "perplexity", "--cores", "2", "--snakefile", str(ROOT / "Snakefile")]
    done = subprocess.run(
        [*command, "--configfile", "mine.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=Workspace.environment(),
    )
    assert done.returncode == 0, done.stderr
    (model,) = (tmp_path / "results").glob("demo-*")
    check_equal(ROOT / "resources" / "models" / "demo", model, "demo", "demo", method, 0.2)


def check_equal(source, results, calibration, evaluation, method, keep):
    """What the functions give is what is in a results folder, to the last digit of the loss of every window."""
    (cell,) = results.glob(f"{calibration}-*/{method}-*/all-{keep}-*")
    measured = next(cell.glob(f"none-*/{evaluation}-*.json"))
    expected, allocation = read_json(measured), read_json(cell / "allocation.json")
    windows, scored = (
        read_tensors(results / "tokens" / f"{label}.safetensors", sealed=True)[0]
        for label in (cell.parent.parent.name, measured.stem)
    )
    made = winnow.compress(source, windows["ids"], method, keep)
    found = winnow.evaluate(made.model, scored["ids"], load_model(source, "float32", "cpu"), first=scored["first"])
    assert found["per_window"] == expected["per_window"]
    same = ("nll", "delta_nll", "delta_nll_se", "kl")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert made.report.stored_bytes == expected["stored_bytes"] == allocation["stored_bytes"]
    if made.report.predicted is not None:
        assert made.report.predicted == pytest.approx(allocation["predicted"], rel=1e-9)
    sizes = [[(row["group"], row["size"]) for row in rows] for rows in (made.report.groups, allocation["groups"])]
    assert sizes[0] == sizes[1]


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
    done = dry_run(command, tmp_path, Workspace.environment())
    assert done.returncode == 0, done.stderr
    assert jobs_of(done.stdout + done.stderr)["compress"] == 2
