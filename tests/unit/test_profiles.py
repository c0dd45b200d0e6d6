"""The cluster profile knows every rule that asks for a GPU, and no rule knows of a cluster."""

import re

import yaml

from tests.conftest import ROOT

RULES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))


def blocks() -> dict[str, str]:
    """{rule: its text, with that of the rule it is derived from}"""
    parts = re.split(r"(?m)^(?=rule \w+:|use rule \w+ as \w+ with:)", RULES)[1:]
    names = [re.match(r"(?:use rule (?P<base>\w+) as |rule )(?P<name>\w+)", part).groupdict() for part in parts]
    own = {name["name"]: part for name, part in zip(names, parts, strict=True)}
    return {n["name"]: own[n["name"]] + (own[n["base"]] if n["base"] else "") for n in names}


def test_the_profile_sends_exactly_the_gpu_rules_to_the_gpu_partition():
    asking = {name for name, text in blocks().items() if re.search(r"^\s+gpu=1,", text, flags=re.MULTILINE)}
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    assert {"collect_statistics", "evaluate_perplexity_healed"} <= asking
    assert set(profile["set-resources"]) == asking
    assert all(resources == {"slurm_partition": "GPU_PARTITION"} for resources in profile["set-resources"].values())


def test_what_is_submitted_together_needs_the_place_of_one():
    """Members of a group run one after the other. Snakemake counts them so only where a resource says that one has room, and
    cuts what a job asks for of a resource to what there is of it."""
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    groups = dict(entry.split("=") for entry in profile["groups"])
    assert set(groups) <= set(blocks())
    assert len(set(groups.values())) == len(groups), "a group of two rules would hold a GPU while it compresses"
    assert not any("_" in group for group in groups.values()), "SLURM's logs are named <group>_<rule>"
    assert dict(entry.split("=") for entry in profile["group-components"]).keys() == set(groups.values())
    assert profile["default-resources"]["slot"] == 1
    assert set(profile["resources"]) == {"slot=1", "gpu=1"}
    assert set(profile["set-resource-scopes"]) == {"slot=local", "gpu=local"}
    assert set(re.findall(r"\bgpu=(\d+)", RULES)) == {"1"}


def test_every_job_that_is_submitted_says_how_much_memory_and_time_it_takes():
    for name, text in blocks().items():
        if "    script:" in text or "    shell:" in text:
            assert "mem_mb=" in text, name
            assert "runtime=" in text, name
    assert "slurm" not in RULES.lower()
