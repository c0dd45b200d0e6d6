"""What files that no rule makes plan to be made again: their content decides, whatever their times and links say.

One place has every kind of them: a model's directory, the hub's cache, texts, rows of classification, and a task's definition,
data and code. All are read through links, to folders that are the same at first.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.unit.reviews import rows
from tests.workflow.test_end_to_end import Workspace

pytestmark = pytest.mark.workflow
OLD = 1_000_000_000  # seconds since 1970, before anything here was made
REVISION = "0123456789abcdef0123456789abcdef01234567"
OF_KIND = {
    "model": Counter(retrieve_model=1),
    "hub": Counter(retrieve_model=1),
    "calibration.jsonl": Counter(retrieve_text=1),
    "evaluation.jsonl": Counter(retrieve_text=1),
    "rows.jsonl": Counter(retrieve_examples=1),
    "tasks": Counter(retrieve_tasks=1),
}
ALL = sum(OF_KIND.values(), Counter()) + Counter(prefetch=1)
DEFINITION = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
process_docs: !function code.documents
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
"""


class Outside(Workspace):
    """A workspace that reads everything through links in `in`, each to a file or folder in `one`; `two` has other content."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        texts = {}
        for name in ("calibration", "evaluation"):
            shutil.copyfile(ROOT / "resources/texts/demo" / f"{name}.jsonl", folder / f"{name}.jsonl")
            texts[name] = {"files": [f"in/{name}.jsonl"], "format": "jsonl", "stop": 12}
        row = {"ctx": "a b", "endings": ["c", "d"], "label": 0}
        (folder / "tasks").mkdir()
        (folder / "tasks/rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
        (folder / "tasks/code.py").write_text("# one\ndef documents(data):\n    return data\n")
        (folder / "tasks/endings.yaml").write_text(DEFINITION.format(data="in/tasks/rows.jsonl"))
        train, test = rows(60, 0), rows(20, 1)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
        known = {row["sentence"] for row in train}
        kept = [row for row in test if row["sentence"] not in known]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        for name in ("one", "two", "in"):
            (folder / name).mkdir()
        for name in ("model", "calibration.jsonl", "evaluation.jsonl", "rows.jsonl", "tasks"):
            shutil.move(folder / name, folder / "one" / name)
            copy = shutil.copytree if (folder / "one" / name).is_dir() else shutil.copy
            copy(folder / "one" / name, folder / "two" / name)
            (folder / "in" / name).symlink_to(folder / "one" / name)
        snapshot = folder / "hub/models--someone--pico/snapshots" / REVISION
        snapshot.mkdir(parents=True)
        for path in (folder / "one/model").iterdir():  # as the hub's library lays out its cache, but for the names of blobs
            (snapshot / path.name).symlink_to(path)
        self.blobs = snapshot
        self.change(folder / "two")
        self.config["texts"] = texts
        self.config["models"] = {"pico": {"source": "in/model"}, "hub": {"source": "someone/pico", "revision": REVISION}}
        columns = {"columns": ["sentence"], "length": 16}
        self.config["evaluations"] |= {
            "reviews": {"kind": "classification", "train": ["in/rows.jsonl"], "test": ["test.jsonl"], **columns},
            "endings": {"kind": "accuracy", "tasks": ["endings"], "include_path": "in/tasks"},
        }
        one = self.config["experiments"]["one"]
        self.config["experiments"]["one"] = one | {
            "models": ["pico", "hub"],
            "evaluations": ["short", "reviews", "endings"],
        }

    @staticmethod
    def change(folder: Path) -> None:
        """Other content of the same size, and older."""
        weights = folder / "model" / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.norm.weight"] += 0.01
        save_file(tensors, weights, metadata={"format": "pt"})
        for name in ("calibration.jsonl", "evaluation.jsonl", "rows.jsonl", "tasks/code.py"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace(" a ", " A ").replace("word1", "word2").replace("# one", "# two"))
        for path in folder.rglob("*"):
            os.utime(path, (OLD, OLD))

    def environment(self) -> dict[str, str]:
        return super().environment() | {"HF_HUB_CACHE": str(self.folder / "hub")}

    def turn(self, name: str, to: str) -> None:
        """Let a link of `in`, or those of the hub's snapshot, lead to another folder."""
        links = list(self.blobs.iterdir()) if name == "hub" else [self.folder / "in" / name]
        for link in links:
            target = self.folder / to / ("model/" + link.name if name == "hub" else name)
            link.unlink()
            link.symlink_to(target)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    place = Outside(tmp_path_factory.mktemp("outside"))
    done = place.run("prefetch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.planned("prefetch") == Counter()
    return place


def replace(folder: Path, by: Path) -> None:
    """Put other files in the place of those of a folder, with their times: what `mv`, `rsync -a` and `tar -x` do."""
    for path in (p for p in by.rglob("*") if p.is_file()):
        new = folder / f"{path.name}.new"
        shutil.copy2(path, new)
        os.replace(new, folder / path.relative_to(by))


def test_an_older_file_in_anothers_place_and_the_way_back(outside, tmp_path):
    kept = shutil.copytree(outside.folder / "one", tmp_path / "kept")
    assert all(path.stat().st_mtime == OLD for path in (outside.folder / "two").rglob("*"))
    replace(outside.folder / "one", outside.folder / "two")
    assert outside.planned("prefetch") == ALL
    replace(outside.folder / "one", kept)
    assert outside.planned("prefetch") == Counter(), "restored, so nothing has changed"


def test_other_content_with_the_same_size_and_time(outside):
    paths = [path for path in (outside.folder / "one").rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    kept = {path: (path.read_bytes(), path.stat()) for path in paths}
    for path, (_, stat) in kept.items():
        other = outside.folder / "two" / path.relative_to(outside.folder / "one")
        assert other.stat().st_size == stat.st_size
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert outside.planned("prefetch") == ALL
    for path, (content, stat) in kept.items():
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert outside.planned("prefetch") == Counter()


def test_touched_and_copied_files_plan_nothing(outside):
    for path in (outside.folder / "one").rglob("*"):
        path.touch()
    replace(outside.folder / "one", Path(shutil.copytree(outside.folder / "one", outside.folder / "copy")))
    assert outside.planned("prefetch") == Counter()
    for path in (outside.folder / "one").rglob("*"):
        os.utime(path, (OLD, OLD))
    assert outside.planned("prefetch") == Counter()


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_link_that_leads_elsewhere_plans_what_reads_it(outside, kind):
    outside.turn(kind, "two")
    assert outside.planned("prefetch") == OF_KIND[kind] + Counter(prefetch=1)
    outside.turn(kind, "one")


def test_what_was_planned_is_made_and_nothing_is_left_to_do(outside):
    for kind in OF_KIND:
        outside.turn(kind, "two")
    done = outside.run("prefetch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outside.planned("prefetch") == Counter()
    for manifest in outside.folder.glob("results/*/model.json"):
        found = json.loads(manifest.read_text())["files"]["model.safetensors"]
        weights = outside.folder / "two/model/model.safetensors"
        assert found == subprocess.run(["sha256sum", weights], capture_output=True, text=True).stdout.split()[0]
    for kind in OF_KIND:
        outside.turn(kind, "one")
    assert outside.planned("prefetch") == ALL


def test_results_without_snakemakes_record_of_other_files_are_refused(outside):
    """.snakemake removed, and then an older text put in the place of the one that was read."""
    (outside.folder / ".snakemake").rename(outside.folder / "elsewhere")
    shutil.copytree(outside.folder / "elsewhere" / "scripts", outside.folder / ".snakemake" / "scripts", dirs_exist_ok=True)
    try:
        (text,) = (outside.folder / "results" / "texts").glob("calibration-*")  # one, since any of them may be asked for first
        refused = outside.run("-n", str(text.relative_to(outside.folder)))
        assert refused.returncode == 1
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("winnow: ")]
        assert "input: in/" in line
        assert "has other content, and Snakemake's own record of it is gone" in line
    finally:
        shutil.rmtree(outside.folder / ".snakemake")
        (outside.folder / "elsewhere").rename(outside.folder / ".snakemake")
