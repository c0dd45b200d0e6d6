"""The notebook of the documentation, executed as it stands there."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "compress.ipynb"


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the kernel: tests run side by side


def test_the_notebook_runs_and_prints_what_is_in_it(one_thread):
    written = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(run, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    results = outputs(run, "pd.DataFrame(results)")
    assert results["winnow"] < 0.05 * results["whitened"], "nats above the dense model, at equal bytes"
    assert outputs(written, "pd.DataFrame(results)") == pytest.approx(results, abs=0.02), "what a reader sees is what it prints"
    (last,) = run.cells[-1].outputs
    assert last["data"]["text/plain"] == "True", "the saved checkpoint is the model in memory"


def outputs(notebook, begins: str) -> dict[str, float]:
    """{method: nats above the dense model} of the table that a cell shows."""
    (cell,) = (cell for cell in notebook.cells if begins in cell.source)
    lines = next(o for o in cell.outputs if "data" in o)["data"]["text/plain"].splitlines()[1:]
    return {line.split()[0]: float(line.split()[1]) for line in lines}
