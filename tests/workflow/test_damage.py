"""Damaged artefacts, full disks and read-only folders: refused by name, no number made, and the run goes on afterwards."""

import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, pico
from tests.workflow.test_end_to_end import Workspace
from tests.workflow.test_rerun_truth import METHODS
from winnow.errors import InputError
from winnow.io.artifacts import before_sealing
from winnow.io.resume import SECONDS
from winnow.models.architectures import ROLES
from winnow.planning.explain import provenance_of

pytestmark = pytest.mark.workflow


def small(folder: Path) -> Workspace:
    """One budget, and two models of the same shape: `pico`, and `other` with other weights."""
    workspace = Workspace(folder)
    shutil.copytree(folder / "model", folder / "other")
    pico("llama", seed=1).save_pretrained(folder / "other")
    config = workspace.config
    config["models"] = {"pico": {"source": "model"}, "other": {"source": "other"}}
    config["methods"] = {name: METHODS[name] for name in ("whitened", "clustered", "kfac")}
    config["budgets"] = {"some": {"targets": ["ffn"], "rank_fraction": 0.4}}
    config["experiments"]["one"] |= {
        "models": ["pico", "other"],
        "methods": list(config["methods"]),
        "budgets": ["some"],
        "controls": False,
    }
    return workspace


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workspace = small(tmp_path_factory.mktemp("damage"))
    done = workspace.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace.folder


class Files(list):
    """Files of a job, by position and by name, as Snakemake hands them to a script."""

    NAMES = [
        (r"/model\.json$", "model"),
        (r"/tokens/", "tokens"),
        (r"\.states\.safetensors$", "states"),
        (r"/dense/", "dense"),
        (r"/checkpoint/", "checkpoint"),
        (r"/moments/", "moments"),
        (r"/gradients/", "gradients"),
        (r"/statistics/outer/", "outer"),
        (r"/clusters/", "clusters"),
        (r"/factors/", "factors"),
        (r"/spectra\.parquet$", "spectra"),
        (r"/predicted\.parquet$", "predicted"),
        (r"/learned\.json$", "learned"),
        (r"/times/", "times"),
        (r"texts/overlap/", "overlaps"),
        (r"results/texts/[^/]+$", "text"),
        (r"summary\.parquet$", "summary"),
        (r"spread\.parquet$", "spread"),
        (r"figures/frontier", "frontier"),
        (r"figures/ranking", "ranking"),
        (r"figures/effective_rank", "effective_rank"),
        (r"/none-\w+/", "results"),
    ]
    MANY = ("factors", "spectra", "predicted", "overlaps", "results")

    def get(self, name: str, default=None):
        pattern = next(p for p, n in self.NAMES if n == {"overlap": "overlaps"}.get(name, name))
        found = [path for path in self if re.search(pattern, path)]
        if name in self.MANY:
            return found
        return found[0] if found else default

    def __getattr__(self, name: str):
        return self.get(name)

    def __getitem__(self, key):
        return self.get(key) if isinstance(key, str) else super().__getitem__(key)


class Drawing(Files):
    """Input of `figures` and `report`, whose spectra are a list and a figure, and statistics a list."""

    def __getitem__(self, key):
        return super().__getitem__("effective_rank" if key == "spectra" else key)

    def get(self, name: str, default=None):
        if name == "spectra":
            return [path for path in self if path.endswith("spectra.parquet")]
        if name == "moments":
            return [path for path in self if "/moments/" in path]
        if name == "models":
            return [path for path in self if path.endswith("/model.json")]
        if name == "allocations":
            return [path for path in self if path.endswith("/allocation.json")]
        if name == "results":
            return [path for path in self if re.search(r"/(none-\w+|dense)/", path)]
        return super().get(name, default)


def run_job(made: str, tmp_path: Path) -> Path:
    """Run the script that made the artefact `made` once more, in this process; it writes below the path returned."""
    provenance, out = provenance_of(Path(made)), tmp_path / "out"
    rule = provenance["rule"]
    job = SimpleNamespace(
        rule=rule,
        input=(Drawing if rule in ("figures", "report") else Files)(provenance["inputs"]),
        output=Outputs(out, Path(made).name),
        log=[str(tmp_path / "log")],
        wildcards=Wildcards(provenance["wildcards"]),
        params=provenance["params"],
        resources=Resources(batch_tokens=4096, stream=0),
        threads=1,
        scriptdir=str(ROOT / "scripts"),
    )
    script = "evaluate" if rule.startswith("evaluate_") else rule
    handlers, hook = logging.getLogger().handlers[:], sys.excepthook
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), {"snakemake": job}, run_name="__main__")
    finally:
        sys.excepthook = hook
        logging.getLogger().handlers[:] = handlers
        before_sealing(lambda: None)
    return out


class Resources(dict):
    """Resources by name, as a key or as an attribute."""

    __getattr__ = dict.__getitem__


class Outputs(list):
    """Output paths below a folder, whatever their name."""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)

    def __init__(self, folder: Path, name: str):
        super().__init__([str(folder / "result" / name)])
        self.folder = folder

    def get(self, name: str, default=None):
        return default

    def __getattr__(self, name: str):
        if name in ("frontier", "ranking", "spectra"):
            return [str(self.folder / f"{name}.svg")]
        if name in ("summary", "spread"):
            return [str(self.folder / "result" / f"{name}.{kind}") for kind in ("csv", "parquet")]
        if name == "allocation":
            return str(self.folder / "allocation.json")
        return str(self.folder / "result" / ("channels.parquet" if name == "channels" else "manifest.json"))


class Wildcards(dict):
    __getattr__ = dict.__getitem__


C = "results/pico-*/few-*"
# (an artefact to damage, an artefact whose job reads it)
CASES = [
    ("results/pico-*/model.json", "results/pico-*/tokens/few-*.safetensors"),
    ("model/model.safetensors", f"{C}/statistics/moments/manifest.json"),
    ("model/tokenizer.json", "results/pico-*/tokens/few-*.safetensors"),
    ("results/texts/calibration-*.parquet", "results/pico-*/tokens/few-*.safetensors"),
    ("results/pico-*/tokens/few-*.safetensors", f"{C}/statistics/moments/manifest.json"),
    (f"{C}/statistics/moments/layer-001.safetensors", f"{C}/whitened-*/factors/1-of-1/manifest.json"),
    (f"{C}/statistics/moments/manifest.json", f"{C}/whitened-*/factors/1-of-1/manifest.json"),
    (f"{C}/statistics/gradients/layer-000.safetensors", f"{C}/kfac-*/factors/1-of-1/manifest.json"),
    (f"{C}/clusters/cosine-*.parquet", f"{C}/clustered-*/factors/1-of-1/manifest.json"),
    (f"{C}/whitened-*/factors/1-of-1/000.up_proj.safetensors", f"{C}/whitened-*/spectra.parquet"),
    (f"{C}/whitened-*/factors/1-of-1/000.up_proj.safetensors", f"{C}/whitened-*/some-*/checkpoint/manifest.json"),
    (f"{C}/whitened-*/spectra.parquet", f"{C}/whitened-*/some-*/checkpoint/manifest.json"),
    (f"{C}/whitened-*/some-*/checkpoint/model.safetensors", f"{C}/whitened-*/some-*/none-*/short-*.json"),
    (f"{C}/whitened-*/some-*/checkpoint/config.json", f"{C}/whitened-*/some-*/none-*/short-*.json"),
    ("results/pico-*/dense/short-*.json", f"{C}/whitened-*/some-*/none-*/short-*.json"),
    ("results/pico-*/dense/short-*.states.safetensors", f"{C}/whitened-*/some-*/none-*/short-*.json"),
    (f"{C}/whitened-*/some-*/none-*/short-*.json", "results/tables/summary.parquet"),
    ("results/tables/summary.parquet", "results/figures/frontier.svg"),
    ("results/figures/ranking.svg", "results/report.html"),
    ("results/texts/overlap/*/*.json", "results/report.html"),
    (f"{C}/statistics/moments/manifest.json", "results/report.html"),
]


def cut(path: Path, folder: Path) -> None:
    path.write_bytes(path.read_bytes()[: 2 * path.stat().st_size // 3])


def flip(path: Path, folder: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace(path: Path, folder: Path) -> None:
    """By the same artefact of the other model, or of anything else where it belongs to no model."""
    name = str(path.relative_to(folder))
    pattern = re.sub(r"^model/", "other/", re.sub(r"pico-\w+", "other-*", name))
    if pattern == name:
        pattern = re.sub(r"calibration-\w+(?=\.)", "evaluation-*", name).replace("ranking", "frontier")
    others = [p for p in folder.glob(pattern) if p.read_bytes() != path.read_bytes()]
    others += [p for p in folder.glob(f"results/other-*/**/*{path.suffix}") if p.is_file()]
    path.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, replace], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("artefact", "reader"), CASES, ids=lambda path: Path(path).parts[-1])
def test_damage_is_refused_by_name_and_gives_no_number(finished, artefact, reader, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    monkeypatch.setenv(SECONDS, "3600")  # what a job had reached, and saved, is no artefact
    (path,), (made,) = finished.glob(artefact), finished.glob(reader)
    name, whole = str(path.relative_to(finished)), path.read_bytes()
    if name == "model/tokenizer.json" and damage is replace:
        pytest.skip("the two models share their tokenizer")
    damage(path, finished)
    try:
        with pytest.raises(InputError) as refused:
            run_job(str(made.relative_to(finished)), tmp_path)
    finally:
        path.write_bytes(whole)
    assert name in str(refused.value)
    written = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    unfinished = {f"{layer:03d}.{role}.safetensors" for layer in (0, 1) for role in ROLES} if "/factors/" in reader else set()
    assert written <= unfinished, "no artefact was made; whole groups of an unfinished bundle may stay"


@pytest.mark.parametrize("reader", dict.fromkeys(reader for _, reader in CASES))
def test_undamaged_artefacts_give_the_same_numbers_again(finished, reader, tmp_path, monkeypatch):
    """The drill runs the real jobs: without damage they write what the workflow wrote."""
    monkeypatch.chdir(finished)
    (made,) = finished.glob(reader)
    out = run_job(str(made.relative_to(finished)), tmp_path)
    assert [p for p in out.rglob("*") if p.is_file()]
    again = out / "result" / made.name
    if made.suffix == ".json" and made.name != "manifest.json":
        assert again.read_bytes() == made.read_bytes()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at `folder`; the test is skipped where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def only_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("winnow: ")}
    assert "Traceback" not in done.stderr
    return line


def test_a_full_disk_and_a_read_only_folder_lose_nothing(tmp_path):
    workspace = small(tmp_path)
    workspace.config["experiments"]["one"]["models"] = ["pico"]
    results = tmp_path / "results"
    with mounted(results, "size=400k"):
        line = only_line(workspace.run("statistics"))
        assert re.match(r"winnow: collect_\w+: No space left on device: results/pico-\w+/few-\w+/statistics/", line)
        kept = {path: path.read_bytes() for path in results.rglob("tokens/*.safetensors")}
        assert kept, "what was finished stays"
        subprocess.run(["mount", "-o", "remount,ro", str(results)], check=True)
        assert (
            only_line(workspace.run("statistics"))
            == "winnow: results cannot be written to (read-only, or not yours); nothing was changed"
        )
        subprocess.run(["mount", "-o", "remount,rw,size=100m", str(results)], check=True)
        done = workspace.run("statistics")
        assert done.returncode == 0, done.stderr
        assert all(path.read_bytes() == content for path, content in kept.items())
        assert not list(results.rglob("*.partial-*"))
        os.sync()
