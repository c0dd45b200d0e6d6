"""Jobs run the code that they are recorded with, whatever other winnow is installed: in forks and in interpreters."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.workflow.test_rerun_truth import Place
from winnow.errors import InputError
from winnow.io import artifacts as io
from winnow.jobs import code as running
from winnow.planning.fingerprints import CodeTracker

pytestmark = pytest.mark.workflow
# Python runs this at the start of every interpreter: another winnow is imported before a job's script is.
FIRST = """
import sys
if ".snakemake/scripts" in " ".join(sys.orig_argv):
    sys.path.insert(0, {other!r})
    import winnow
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """Where another winnow is: with a constant that shows in a result."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src" / "winnow", tmp_path / "site" / "winnow", ignore=ignore)
    texts = tmp_path / "site" / "winnow" / "data" / "texts.py"
    texts.write_text(texts.read_text().replace("SHINGLE = 24", "SHINGLE = 23"))
    return tmp_path / "site"


class Overlap(Place):
    """Runs three jobs, as many as it takes for forks, one of which says how many words it compared."""

    def __init__(self, folder: Path, path: Path, **variables: str):
        super().__init__(folder)
        self.variables = {"PYTHONPATH": str(path), **variables}

    def command(self, *arguments: str) -> dict:
        command = super().command(*arguments, "--until", "check_overlap")
        return command | {"env": command["env"] | self.variables}

    def words(self) -> int:
        (result,) = self.folder.glob("results/texts/overlap/*/*.json")
        return json.loads(result.read_text())["words_per_run"]


@pytest.mark.parametrize("warm", ["1", "0"])
def test_the_checkouts_code_runs_where_another_is_installed(tmp_path, installed, warm):
    place = Overlap(tmp_path / "here", installed, WINNOW_WARM=warm)
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.words() == 24


def test_a_job_that_got_another_package_writes_nothing(tmp_path, installed):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(FIRST.format(other=str(installed)))
    place = Overlap(tmp_path / "here", tmp_path / "first", WINNOW_WARM="0")
    done = place.run()
    assert done.returncode == 1
    expected = (
        f"the workflow is in {place.code}, but Python imports winnow from {installed / 'winnow'}: results would be recorded"
    )
    assert f"winnow: retrieve_text: {expected}" in done.stderr
    assert not [path for path in (place.folder / "results").rglob("*") if path.suffix in (".parquet", ".json")]


def test_the_package_of_a_run_is_that_of_its_workflow(tmp_path, installed):
    running.check_place(ROOT)
    (tmp_path / "src").mkdir()
    shutil.copytree(installed / "winnow", tmp_path / "src" / "winnow")
    with pytest.raises(InputError, match=f"with PYTHONPATH={tmp_path / 'src'}"):
        running.check_place(tmp_path)


def test_nothing_is_sealed_with_code_that_was_edited_after_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "_checks", [])
    monkeypatch.chdir(tmp_path)
    params = {"code": list(CodeTracker(ROOT).fingerprint("retrieve_text.py", "winnow.metrics.gram"))}
    running.check_scripts(ROOT / "scripts", params)
    io.before_sealing(lambda: running.check_code(params))
    io.write_json(tmp_path / "right.json", {})
    place, name = next((i, line.split()[0]) for i, line in enumerate(params["code"]) if line.split()[0] in sys.modules)
    params["code"][place] = f"{name} 0123456789"
    with pytest.raises(InputError, match=f"{name} is not the code that this run was planned with: it was edited in the"):
        io.write_json(tmp_path / "wrong.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right.json"]
    script = next(line for line in params["code"] if line.startswith("retrieve_text.py"))
    params["code"] = [script[:-1] + ("0" if script[-1] != "0" else "1")]
    with pytest.raises(InputError, match=r"retrieve_text\.py is not the code that this run was planned with"):
        running.check_scripts(ROOT / "scripts", params)
