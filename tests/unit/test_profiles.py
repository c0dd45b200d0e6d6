"""The cluster profile knows every rule that asks for a GPU, and no rule knows of a cluster."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.plan import Plan
from winnow.planning.stages.base import stages_of

RULES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
# The workflow as Snakemake reads it: rules are made in loops too.
READ = """
import json, sys
from pathlib import Path
from snakemake.api import ResourceSettings, SnakemakeApi, ConfigSettings
from snakemake.settings.types import OutputSettings, Quietness

with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
    sys.argv = ["snakemake"]
    workflow = api.workflow(ResourceSettings(cores=1), ConfigSettings(), snakefile=Path("Snakefile"))._workflow
    runs = lambda rule: bool(rule.script or rule.shellcmd)
    asked = lambda rule: {"resources": sorted(rule.resources), "gpu": "gpu" in rule.resources, "runs": runs(rule)}
    found = {rule.name: asked(rule) for rule in workflow.rules}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def rules():
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_profile_sends_exactly_the_gpu_rules_to_the_gpu_partition(rules):
    asking = {name for name, rule in rules.items() if rule["gpu"]}
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    assert {"collect_statistics", "evaluate_perplexity_healed"} <= asking
    assert set(profile["set-resources"]) == asking
    assert all(resources == {"slurm_partition": "GPU_PARTITION"} for resources in profile["set-resources"].values())


def test_the_forecast_has_the_rules_that_ask_for_a_gpu(rules):
    """Except `compress_refitted`, the only one of its stage, and times, which are of the device that they name."""
    stages = stages_of(Plan(load(default()), ROOT)).values()
    on_device = {rule for stage in stages if stage.on_device for rule in stage.rules}
    asking = {name for name, rule in rules.items() if rule["gpu"]}
    assert asking - on_device == {"compress_refitted", "time_forms"}
    assert not on_device - asking


def test_what_is_submitted_together_needs_the_place_of_one(rules):
    """Members of a group run one after the other. Snakemake counts them so only where a resource says that one has room, and
    cuts what a job asks for of a resource to what there is of it."""
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    groups = dict(entry.split("=") for entry in profile["groups"])
    assert set(groups) <= set(rules)
    assert len(set(groups.values())) == len(groups), "a group of two rules would hold a GPU while it compresses"
    assert not any("_" in group for group in groups.values()), "SLURM's logs are named <group>_<rule>"
    assert dict(entry.split("=") for entry in profile["group-components"]).keys() == set(groups.values())
    assert profile["default-resources"]["slot"] == 1
    assert set(profile["resources"]) == {"slot=1", "gpu=1"}
    assert set(profile["set-resource-scopes"]) == {"slot=local", "gpu=local"}
    assert set(re.findall(r"\bgpu=(\d+)", RULES)) == {"1"}


def test_every_job_that_is_submitted_says_how_much_memory_and_time_it_takes(rules):
    for name, rule in rules.items():
        if rule["runs"]:
            assert {"mem_mb", "runtime"} <= set(rule["resources"]), name
    assert "slurm" not in RULES.lower()
