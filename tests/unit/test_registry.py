"""One plug-in of each kind by adding one file: it is found, built from a preset, in the configuration, and in fingerprints."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.toys import FILES, METRIC, STUDY

KINDS = {  # package: (class, module and name of the registry)
    "metrics": ("metric", "winnow.metrics.base", "METRICS"),
    "structures": ("structure", "winnow.structures.base", "STRUCTURES"),
    "allocation/kinds": ("allocation", "winnow.allocation.base", "ALLOCATIONS"),
    "recovery/kinds": ("recovery", "winnow.recovery.base", "RECOVERIES"),
    "evaluation/kinds": ("evaluation", "winnow.evaluation.base", "EVALUATIONS"),
    "studies": ("study", "winnow.studies.base", "STUDIES"),
}
ASKED = """
import importlib, json, sys
from pathlib import Path
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.fingerprints import CodeTracker
from winnow.planning.plan import Plan

what, module, name, root = sys.argv[1:]
registry = getattr(importlib.import_module(module), name)
spec = {"kind": "toy"}
built = registry.build(spec) if what != "study" else importlib.import_module(module).study_of("toy")
content = default()
if what in ("metric", "structure"):
    content["methods"]["whitened"][what] = spec
if what == "allocation":
    content["budgets"]["ffn-0.8"]["allocation"] = spec
if what in ("recovery", "evaluation"):
    content["recoveries" if what == "recovery" else "evaluations"]["mine"] = spec
plan = Plan(load(content), Path(root))
code = CodeTracker(Path(root)).fingerprint(registry.module("toy"))
print(json.dumps({
    "kinds": list(registry), "built": type(built).__name__, "options": built.options.model_dump(),
    "code": [line.split()[0] for line in code], "studies": list(plan.of_studies), "torch": "torch" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


@pytest.mark.parametrize("package", KINDS)
def test_one_file_adds_a_plug_in(checkout, package):
    what, module, name = KINDS[package]
    file = f"{package}/toy/study.py" if what == "study" else f"{package}/toy.py"
    path = checkout / "src" / "winnow" / file
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(STUDY if what == "study" else FILES[package])
    try:
        command = [sys.executable, "-c", ASKED, what, module, name, str(checkout)]
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=checkout)
    finally:
        shutil.rmtree(path.parent) if what == "study" else path.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "toy" in found["kinds"]
    assert found["built"] == "Toy"
    assert found["options"] == ({} if what == "study" else {"kind": "toy"} | found["options"])
    assert f"winnow.{file.removesuffix('.py').replace('/', '.')}" in found["code"]
    assert ("toy" in found["studies"]) == (what == "study")
    assert not found["torch"], "a plan imports no torch"


def test_a_kind_is_named_by_its_file(checkout):
    path = checkout / "src" / "winnow" / "metrics" / "other.py"
    path.write_text(METRIC)
    ask = "from winnow.metrics.base import METRICS; list(METRICS)"
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    path.unlink()
    assert "winnow.metrics.other: the kind of a plug-in is the name of its file, not 'toy'" in done.stderr
