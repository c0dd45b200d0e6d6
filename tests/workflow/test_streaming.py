"""`load: stream`: the whole workflow gives the numbers of models in memory, and the option is in no key of the cache."""

from pathlib import Path

import pytest

from tests.benchmarks.streaming import MIB, OFF, configuration, forecasts, peaks, run, write_model
from tests.workflow.test_end_to_end import Workspace
from winnow.io.artifacts import Bundle, read_json, read_parquet
from winnow.planning.config_files import default

pytestmark = pytest.mark.workflow
LAST = 1e-6


def results(folder: Path, name: str) -> list[Path]:
    return sorted(p.relative_to(folder) for p in (folder / "results").rglob(name) if "logs" not in p.parts)


@pytest.mark.slow
def test_streaming_changes_no_number_and_no_key(tmp_path):
    whole, streamed = (Workspace(tmp_path / name) for name in ("whole", "streamed"))
    for place in (whole, streamed):  # the recommended preset needs gradients and predicted losses
        place.config["methods"]["winnow"] = default()["methods"]["winnow"]
        place.config["budgets"]["all-0.4"] = {"targets": ["ffn", "attention"], "keep_bytes": 0.4}
        (name,) = place.config["experiments"]
        one = {"methods": ["winnow"], "budgets": ["all-0.4"]}
        place.config["experiments"]["recommended"] = place.config["experiments"][name] | one
    streamed.config["models"]["pico"] |= {"load": "stream", "source": str(whole.folder / "model")}
    whole.config["models"]["pico"] |= {"source": str(whole.folder / "model")}
    for place in (whole, streamed):
        done = place.run()
        assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in (streamed.folder / "results/logs/collect_statistics").rglob("*.log")]
    assert any("calibration batches of layer 1" in text for text in logs), "it was streamed"
    assert "of layer" not in "".join(p.read_text() for p in (whole.folder / "results/logs").rglob("*.log"))
    for path in results(whole.folder, "short.json"):
        one, two = (read_json(place.folder / path) for place in (whole, streamed))
        for key in ("nll", "nll_se", "kl", "top1_agreement", "delta_nll"):
            assert two.get(key) == pytest.approx(one.get(key), rel=LAST, abs=LAST), (path, key)
        assert two["per_window"]["nll"] == pytest.approx(one["per_window"]["nll"], rel=LAST)
    for path in results(whole.folder, "channels.parquet"):
        one, two = (read_parquet(place.folder / path) for place in (whole, streamed))
        assert one.drop(columns=["site"]).to_numpy() == pytest.approx(two.drop(columns=["site"]).to_numpy(), rel=LAST, abs=LAST)
    chosen = results(whole.folder, "allocation.json")
    assert any("winnow" in str(path) for path in chosen)
    for path in chosen:
        one, two = (read_json(place.folder / path)["groups"] for place in (whole, streamed))
        assert [(group["group"], group["size"]) for group in one] == [(group["group"], group["size"]) for group in two]
    bundles = [p for p in results(whole.folder, "manifest.json") if p.parent.name in ("moments", "gradients")]
    assert len({p.parent.name for p in bundles}) == 2
    for path in bundles:
        one, two = (Bundle(place.folder / path) for place in (whole, streamed))
        for name in one.manifest["files"]:
            there = two.tensors(name)
            for key, value in one.tensors(name).items():
                assert float((value - there[key]).abs().max()) <= LAST * float(value.abs().max())
    assert not list(streamed.folder.rglob(".*.hidden*")) + list(streamed.folder.rglob(".*.compared*"))
    streamed.config["models"]["pico"]["load"] = "whole"
    assert streamed.planned() == {}, "how a model is read is no reason to compute anew"
    recipe = next((streamed.folder / "results").rglob("recipe.yaml")).read_text()
    assert "load" not in recipe


def test_one_run_can_stream(tmp_path):
    """Without an edit of the configuration."""
    place = Workspace(tmp_path)
    done = place.run("statistics", "--set-resources", "collect_statistics:stream=1")
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in (place.folder / "results/logs/collect_statistics").rglob("*.log")]
    assert any("calibration batches of layer 1" in text for text in logs)


@pytest.mark.slow
def test_a_limit_of_the_operating_system_that_the_model_exceeds(tmp_path):
    """Memory that the whole model does not fit into, by far; and the forecast of the peak. tests/benchmarks/streaming.py does it
    with all stages and a model that is larger than the limit on disk."""
    write_model(tmp_path / "model", layers=26, width=512, hidden=2048, vocabulary=4000, stored="float32")
    limit = 650 * MIB
    config = configuration(tmp_path / "model", windows=2, length=32, load="whole")
    status, output = run(tmp_path, config, limit, threads=1, target="statistics")
    assert status, "the whole model cannot be loaded"
    assert "memory" in output.lower(), output
    config["models"]["large"]["load"] = "stream"
    status, output = run(tmp_path, config, limit, threads=1, target="statistics")
    assert status == 0, output
    (made,) = tmp_path.glob("results/large-*/c-*/statistics")
    target = str(made.relative_to(tmp_path) / "gradients" / "manifest.json")
    status, output = run(tmp_path, config, limit, threads=1, target=target)
    assert status == 0, output
    found, expected = peaks(tmp_path), forecasts(config, next(tmp_path.glob("results/large-*/model.json")))
    for stage in ("collect_statistics", "collect_gradients"):
        assert found[stage] < limit
        assert abs(expected[stage] / found[stage] - 1) <= OFF, (stage, expected[stage], found[stage])
