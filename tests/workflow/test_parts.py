"""`window_shards`: several jobs run the calibration windows, and the sums of their moments are those of one job."""

import copy

import pytest

from tests.workflow.test_end_to_end import Workspace
from tests.workflow.test_streaming import LAST, results
from winnow.io.artifacts import Bundle, read_parquet
from winnow.planning.config_files import default

pytestmark = pytest.mark.workflow
COLLECTED = ("collect_statistics", "collect_gradients", "merge_statistics", "merge_gradients")
PARTS = ("collect_statistics_part", "collect_gradients_part")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[int, Workspace]:
    """Finished statistics and gradients with the windows in one job, and in three that read the model block by block and, for
    gradients, run their windows in two portions each."""
    found = {}
    for jobs in (1, 3):
        place = Workspace(tmp_path_factory.mktemp(f"parts{jobs}"))
        place.config["methods"] = {"kfac": default()["methods"]["kfac"]}
        place.config["calibrations"]["few"]["windows"] = 150
        place.config["budgets"] = {"ffn-0.5": place.config["budgets"]["ffn-0.5"]}
        place.config["experiments"]["one"] |= {"methods": ["kfac"], "budgets": ["ffn-0.5"]}
        place.config["models"]["pico"] |= {"window_shards": jobs, "load": "stream" if jobs > 1 else "whole"}
        place.config["models"]["pico"]["source"] = str((found.get(1) or place).folder / "model")
        done = place.run("--until", *COLLECTED, "--set-resources", "collect_gradients_part:hidden_mb=1")
        assert done.returncode == 0, done.stderr
        found[jobs] = place
    return found


def test_sums_of_parts_are_those_of_one_job(places):
    one, three = places[1].folder, places[3].folder
    bundles = [p for p in results(one, "manifest.json") if p.parent.name in ("moments", "gradients")]
    assert len(bundles) == 2
    for path in bundles:
        whole, merged = Bundle(one / path), Bundle(three / path)
        assert whole.manifest["tokens"] == merged.manifest["tokens"] == 150 * 32
        for name in whole.manifest["files"]:
            there = merged.tensors(name)
            for key, value in whole.tensors(name).items():
                assert float((value - there[key]).abs().max()) <= LAST * float(value.abs().max()), (name, key)
    (path,) = results(one, "channels.parquet")
    whole, merged = (read_parquet(place / path).drop(columns=["site"]).to_numpy() for place in (one, three))
    assert merged == pytest.approx(whole, rel=LAST, abs=LAST)
    logs = [path.read_text() for path in (three / "results/logs/collect_statistics_part").rglob("*.log")]
    assert len(logs) == 3
    assert all("calibration batches of layer 1" in text for text in logs), "they were streamed"
    logs = [path.read_text() for path in (three / "results/logs/collect_gradients_part").rglob("*.log")]
    assert ["2 portions of up to 25 windows" in text for text in logs] == [True] * 3
    assert not list((three / "results").rglob("parts/*/*/*")), "the sums of the parts are removed"


def test_nothing_is_computed_again_without_the_parts_unless_something_changed(places):
    place = places[3]
    assert place.planned("--until", *COLLECTED) == {}
    before = copy.deepcopy(place.config)
    try:
        place.config["calibrations"]["few"]["precision"] = "float32"
        place.config["calibrations"]["few"]["first_token"] = False
        planned = place.planned("--until", *COLLECTED)
        assert {rule: planned[rule] for rule in (*PARTS, "merge_statistics", "merge_gradients")} == {
            **dict.fromkeys(PARTS, 3),
            "merge_statistics": 1,
            "merge_gradients": 1,
        }
    finally:
        place.config = before
    manifest = next((place.folder / "results").glob("pico-*/few-*/statistics/gradients/manifest.json"))
    manifest.unlink()
    planned = place.planned(str(manifest.relative_to(place.folder)))
    assert planned == {"collect_gradients_part": 3, "merge_gradients": 1}, "their sums are made again"
