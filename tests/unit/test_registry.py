"""One plug-in of each kind by adding one file: it is found, built from a preset, in the configuration, and in fingerprints."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

METRIC = '''
from typing import Literal

from winnow.metrics.base import Metric, MetricOptions


class New(Metric):
    """All columns alike."""

    reference = "a test"

    class Options(MetricOptions):
        kind: Literal["new"]
        size: int = 1

    def columns(self, weight, site):
        return weight.new_ones(weight.shape[1])
'''
STRUCTURE = '''
from typing import Literal

from winnow.structures.base import StructureOptions
from winnow.structures.low_rank import LowRank


class New(LowRank):
    """As `low_rank`."""

    class Options(StructureOptions):
        kind: Literal["new"]
        size: int = 1
'''
ALLOCATION = '''
from typing import Literal

from winnow.allocation.base import Allocation, AllocationOptions, Choice, smallest


class New(Allocation):
    """The smallest size of everything."""

    reference = "a test"

    class Options(AllocationOptions):
        kind: Literal["new"]
        size: int = 1

    def allocate(self, groups, keep):
        return Choice(smallest(groups))
'''
RECOVERY = '''
from typing import Literal

from winnow.recovery.base import Recovery, RecoveryOptions


class New(Recovery):
    """Nothing."""

    reference = "a test"

    class Options(RecoveryOptions):
        kind: Literal["new"]
        size: int = 1

    def recover(self, task):
        return {"steps": 0}
'''
EVALUATION = '''
from typing import Literal

from winnow.evaluation.base import Evaluation, EvaluationOptions


class New(Evaluation):
    """Nothing."""

    reference = "a test"

    class Options(EvaluationOptions):
        kind: Literal["new"]
        size: int = 1

    @classmethod
    def measure(cls, given):
        return {"size": given.spec["size"]}
'''
STUDY = '''
from winnow.studies.base import Study


class New(Study):
    """Nothing."""

    title = "New"
    reference = "a test"

    def measure(self, given):
        return {}

    def conclude(self, evidence):
        raise NotImplementedError
'''
# kind of plug-in: (its file, what is in it, module and name of the registry, section of the configuration and where it stands)
KINDS = {
    "metric": ("metrics/new.py", METRIC, "winnow.metrics.base", "METRICS"),
    "structure": ("structures/new.py", STRUCTURE, "winnow.structures.base", "STRUCTURES"),
    "allocation": ("allocation/kinds/new.py", ALLOCATION, "winnow.allocation.base", "ALLOCATIONS"),
    "recovery": ("recovery/kinds/new.py", RECOVERY, "winnow.recovery.base", "RECOVERIES"),
    "evaluation": ("evaluation/kinds/new.py", EVALUATION, "winnow.evaluation.base", "EVALUATIONS"),
    "study": ("studies/new/study.py", STUDY, "winnow.studies.base", "STUDIES"),
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
spec = {"kind": "new"} if what == "study" else {"kind": "new", "size": 2}
built = registry.build(spec)
content = default()
if what in ("metric", "structure"):
    content["methods"]["whitened"][what] = spec
if what == "allocation":
    content["budgets"]["ffn-0.8"]["allocation"] = spec
if what in ("recovery", "evaluation"):
    content["recoveries" if what == "recovery" else "evaluations"]["mine"] = spec
plan = Plan(load(content), Path(root))
code = CodeTracker(Path(root)).fingerprint(registry.module("new"))
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


@pytest.mark.parametrize("what", KINDS)
def test_one_file_adds_a_plug_in(checkout, what):
    file, content, module, name = KINDS[what]
    path = checkout / "src" / "winnow" / file
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(content)
    try:
        command = [sys.executable, "-c", ASKED, what, module, name, str(checkout)]
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=checkout)
    finally:
        shutil.rmtree(path.parent) if what == "study" else path.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "new" in found["kinds"]
    assert found["built"] == "New"
    assert found["options"] == ({"kind": "new"} if what == "study" else found["options"] | {"kind": "new", "size": 2})
    assert f"winnow.{file.removesuffix('.py').replace('/', '.')}" in found["code"]
    assert ("new" in found["studies"]) == (what == "study")
    assert not found["torch"], "a plan imports no torch"


def test_a_kind_is_named_by_its_file(checkout):
    path = checkout / "src" / "winnow" / "metrics" / "other.py"
    path.write_text(METRIC)
    ask = "from winnow.metrics.base import METRICS; list(METRICS)"
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    path.unlink()
    assert "winnow.metrics.other: the kind of a plug-in is the name of its file, not 'new'" in done.stderr
