"""`factors: refitted`: factors without tensors, and checkpoints that are those of factors with them, to the last bit."""

import json
from collections import Counter

import pytest

from tests.workflow.test_end_to_end import Workspace
from winnow.io.artifacts import Bundle, read_parquet
from winnow.io.tensors import read_header

pytestmark = pytest.mark.workflow
FED_BACK = {"group": 16, "grids": ["full"], "scales": "unbiased", "rounding": "feedback"}
MEMBERS = [
    {"kind": "gauge_fixed"},
    {"kind": "affine_block"},
    {"kind": "rounded", "bits": [2, 3, 4, 8], **FED_BACK},
    {"kind": "rounded_neuron_slice", "criterion": "loss", "neurons": [0.5, 1.0], "bits": [3, 8], **FED_BACK},
]
LATER = {"affine_block", "low_rank"}  # read no gradients: another job predicts their losses, and fits them again for that
KINDS = {member["kind"] for member in MEMBERS} | {"low_rank"}
UNTIL = ("--until", "compress", "compress_refitted")
TENSORS = {"spectrum", "error", "numbers"}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Workspace]:
    """Checkpoints of stored and of refitted factors."""
    found = {}
    for factors in ("stored", "refitted"):
        place = Workspace(tmp_path_factory.mktemp(factors))
        config = place.config
        config["methods"] = {
            "all": {"structure": {"kind": "mixed", "members": MEMBERS}, "metric": {"kind": "two_sided"}},
            "inputs": {"structure": {"kind": "low_rank"}, "metric": {"kind": "gram"}},
        }
        budget = {"targets": ["ffn", "attention"], "keep_bytes": 0.3, "allocation": {"kind": "ilp"}}
        config["budgets"] = {"few": budget}
        config["experiments"]["one"] |= {"methods": ["all", "inputs"], "budgets": ["few"]}
        config["models"]["pico"] |= {"factors": factors, "shards": 1}
        config["models"]["pico"]["source"] = str((found.get("stored") or place).folder / "model")
        done = place.run(*UNTIL, "--quiet", "rules", "host", "reason")
        assert done.returncode == 0, done.stderr
        found[factors] = place
    return found


def files(place: Workspace, pattern: str) -> dict[str, bytes]:
    found = {str(path.relative_to(place.folder)): path.read_bytes() for path in (place.folder / "results").glob(pattern)}
    assert found, pattern
    return found


def test_weights_and_allocations_are_those_of_stored_factors(places):
    for pattern in ("*/*/*/*/checkpoint/*.safetensors", "*/*/*/*/checkpoint/config.json", "*/*/*/*/checkpoint/recipe.yaml"):
        assert files(places["refitted"], pattern) == files(places["stored"], pattern)
    names = files(places["stored"], "*/*/*/*/allocation.json")
    assert len(names) == 2
    used = set()
    for name in names:
        one, other = (json.loads((place.folder / name).read_text()) for place in places.values())
        for record in (one, other):
            del record["provenance"], record["seal"], record["seconds"]
        assert one == other
        used |= {row["group"].partition("@")[2] for row in one["groups"] if row["size"] is not None}
    assert {"", "rounded"} <= used, "both methods store sizes that were fitted again"
    for name in files(places["stored"], "*/*/*/predicted.parquet"):
        one, other = (read_parquet(place.folder / name) for place in places.values())
        assert one.equals(other), name


def test_factors_hold_no_tensors_of_what_is_fitted_again(places):
    bundles = sorted((places["refitted"].folder / "results").glob("pico-*/few-*/*/factors/*/manifest.json"))
    kinds = set()
    for path in bundles:
        kind = Bundle(path).manifest["provenance"]["params"]["spec"]["method"]["structure"]["kind"]
        held = [set(read_header(file)) for file in path.parent.glob("*.safetensors")]
        assert all(tensors == TENSORS | (set() if kind in LATER else {"predicted"}) for tensors in held), path
        kinds |= {kind} if held else set()
    assert kinds == KINDS
    sizes = {
        name: sum(len(content) for content in files(place, "*/*/*/factors/*/*.safetensors").values())
        for name, place in places.items()
    }
    assert sizes["refitted"] < 0.3 * sizes["stored"], sizes


def test_the_option_makes_factors_and_checkpoints_anew_and_is_in_no_label(places):
    place = places["refitted"]
    assert place.planned(*UNTIL) == Counter()
    place.config["models"]["pico"]["factors"] = "stored"
    try:
        planned = place.planned(*UNTIL)
    finally:
        place.config["models"]["pico"]["factors"] = "refitted"
    made = {
        rule: planned[rule] for rule in ("collect_statistics", "collect_gradients", "factorize", "compress", "compress_refitted")
    }
    again = len(KINDS)  # one shard of each
    assert made == {"collect_statistics": 0, "collect_gradients": 0, "factorize": again, "compress": 2, "compress_refitted": 0}
    place.config["budgets"]["other"] = {"targets": ["ffn"], "keep_bytes": 0.5, "allocation": {"kind": "ilp"}}
    place.config["experiments"]["one"]["budgets"].append("other")
    planned = place.planned(*UNTIL)
    assert (planned["factorize"], planned["compress_refitted"], planned["predict_losses"]) == (0, 2, 0)
