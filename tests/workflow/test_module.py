"""The workflow as a module of another one, from a folder and from a Git repository: the same jobs and results as by itself."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.workflow.test_end_to_end import Workspace

pytestmark = pytest.mark.workflow
HUB = "github.com/example/winnow"
SNAKEFILE = """
configfile: "config.yaml"
module winnow:
    snakefile: {snakefile}
    config: config
use rule * from winnow
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Workspace:
    """One cell, by the workflow itself."""
    workspace = Workspace(tmp_path_factory.mktemp("alone"))
    (experiment,) = workspace.config["experiments"].values()
    experiment.update(methods=["svd"], budgets=["ffn-0.5"])
    done = workspace.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def using(folder: Path, snakefile: str, config: dict) -> Path:
    """A folder with a workflow that uses this one."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "Snakefile").write_text(SNAKEFILE.format(snakefile=snakefile))
    return folder


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--scheduler", "greedy", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def made(folder: Path) -> dict[str, float | None]:
    """{file of results: the loss in it}."""
    found = {}
    for path in sorted((folder / "results").rglob("*")):
        name = str(path.relative_to(folder / "results"))
        if path.is_file() and not name.startswith(("logs/", "benchmarks/")):
            content = json.loads(path.read_text()) if path.suffix == ".json" else {}
            found[name] = content.get("nll")
    return found


def test_a_snakefile_of_five_lines_makes_the_same_results(alone, tmp_path):
    folder = using(tmp_path / "mine", f'"{ROOT / "Snakefile"}"', alone.config)
    run(folder)
    expected = made(alone.folder)
    assert sum(loss is not None for loss in expected.values()) == 2, "of the dense and of the compressed model"
    assert made(folder) == expected
    assert "Nothing to be done" in run(folder, "-n")
    assert "2 cells, 0 jobs to run" in run(folder, "plan")


def test_relative_paths_are_of_the_users_folder_and_presets_known_by_name(alone, tmp_path):
    config = copy.deepcopy(alone.config)
    config["models"]["pico"]["source"] = "own"
    del config["methods"]
    folder = using(tmp_path / "mine", f'"{ROOT / "Snakefile"}"', config)
    (folder / "own").symlink_to(alone.folder / "model")
    assert re.search(r"^compress +1$", run(folder, "-n"), flags=re.MULTILINE)


def test_of_a_git_repository_the_whole_commit_is_used(alone, tmp_path, monkeypatch):
    """As `snakedeploy` writes it, of a repository on GitHub; Git reads a local one in its place. Its rules get a prefix."""
    repository = tmp_path / "repository"
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "--git-dir", str(repository)]
    parts = ["Snakefile", "src", "scripts", "workflow"]
    subprocess.run([*git, "init", "--quiet", "--bare"], check=True)
    for command in (["add", *parts], ["commit", "--quiet", "--message", "all"], ["tag", "v9"]):
        subprocess.run([*git, "--work-tree", str(ROOT), *command], check=True, cwd=ROOT)
    elsewhere = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://{HUB}",
    }
    for name, value in {**elsewhere, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    source = f'github("{HUB.partition("/")[2]}", path="workflow/Snakefile", tag="v9")'
    folder = using(tmp_path / "mine", source, alone.config)
    (folder / "Snakefile").write_text((folder / "Snakefile").read_text().rstrip() + " as its_*\n")
    run(folder, "--until", "its_check_overlap")
    assert list(folder.glob("results/texts/overlap/*/*.json"))
    (unpacked,) = folder.glob(".snakemake/winnow/*")
    assert (unpacked / "src" / "winnow" / "__init__.py").is_file()
    jobs = run(folder, "-n", "--quiet", "rules", "host", "reason")
    assert re.findall(r"^(its_(?:compress|evaluate_perplexity|winnow)) +1$", jobs, flags=re.MULTILINE), jobs
    assert "its_check_overlap" not in jobs
