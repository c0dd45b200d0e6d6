"""Tracing an artefact back, and finding what no preset reaches."""

import json
import shutil

import pandas as pd
import pytest
import torch

from tests.conftest import ROOT
from tests.unit.test_plan import plan_of, wildcards_of
from winnow.errors import InputError
from winnow.io.artifacts import file_digest, write_json, write_manifest, write_parquet, write_tensors
from winnow.planning.explain import differences, explain, provenance_of
from winnow.planning.prune import remove, unreached


def provenance(plan, stage, inputs=()):
    wildcards = wildcards_of(plan, stage)
    params = plan.params(stage, wildcards)
    return {"rule": stage, "wildcards": wildcards, "params": params, "inputs": {str(p): file_digest(p) for p in inputs}}


def path_of(folder, plan, stage, name):
    return folder.joinpath(*wildcards_of(plan, stage).values(), name)


def test_an_artefact_made_today_differs_in_nothing_and_an_edit_is_named(tmp_path):
    plan = plan_of()
    model = path_of(tmp_path, plan, "retrieve_model", "model.json")
    write_json(model, {"a": 1}, provenance(plan, "retrieve_model"))
    spectra = path_of(tmp_path, plan, "measure_spectra", "spectra.parquet")
    write_parquet(spectra, pd.DataFrame({"a": [1]}), provenance(plan, "measure_spectra", [model]))
    allocation = path_of(tmp_path, plan, "compress", "allocation.json")
    write_json(allocation, {"a": 1}, provenance(plan, "compress", [model, spectra]))
    assert differences(provenance_of(allocation), plan) == []
    lines = list(explain(allocation, plan))
    assert sum("made by" in line for line in lines) == 3
    assert sum("up to date" in line for line in lines) == 3
    assert [line.strip() for line in lines].count(f"from {model} (above)") == 1

    after = plan_of(lambda c: c["budgets"]["ffn-0.8"].update(keep_bytes=0.7))
    assert "no preset of the configuration has the label of budget ffn-0.8" in differences(provenance_of(allocation), after)[0]
    write_parquet(spectra, pd.DataFrame({"a": [2]}), provenance(plan, "measure_spectra", [model]))
    assert differences(provenance_of(allocation), plan) == [f"input: {spectra} has other content"]
    model.unlink()
    assert f"input: {model} is gone" in differences(provenance_of(allocation), plan)


def test_changed_code_versions_and_params_are_named(tmp_path):
    for folder in ("src", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    plan = plan_of(root=tmp_path)
    then = json.loads(json.dumps(provenance(plan, "compress")))
    path = tmp_path / "src" / "winnow" / "allocation" / "groups.py"
    path.write_text(path.read_text().replace("TOLERANCE = 0.005", "TOLERANCE = 0.006"))
    (line,) = differences(then, plan_of(root=tmp_path))
    assert line.startswith("code: winnow.allocation.groups ")
    then["params"]["versions"]["pandas"] = "0.1"
    then["params"]["spec"]["presets"]["budget"]["keep_bytes"] = 0.5
    found = differences(then, plan)
    assert "presets.budget.keep_bytes: 0.5 then, 0.8 now" in found
    assert any(line.startswith('version of pandas: "0.1" then, ') for line in found)


def test_every_kind_of_artefact_tells_its_provenance(tmp_path):
    known = {"rule": "r", "wildcards": {}, "params": {}, "inputs": {}}
    write_json(tmp_path / "a.json", {}, known)
    write_parquet(tmp_path / "a.parquet", pd.DataFrame({"a": [1]}), known)
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"provenance": known}, sealed=True)
    write_tensors(tmp_path / "b" / "part.safetensors", {"x": torch.ones(2)}, known)
    write_manifest(tmp_path / "b", {}, known)
    for name in ("a.json", "a.parquet", "a.safetensors", "b", "b/part.safetensors"):
        assert provenance_of(tmp_path / name) | {"file": ""} == known | {"file": ""}
    (tmp_path / "report.html").write_text("<html>")
    for name in ("report.html", "nothing.json"):
        with pytest.raises(InputError, match=name):
            provenance_of(tmp_path / name)


def test_what_no_preset_reaches_is_found_with_its_bytes_and_nothing_else(tmp_path):
    plan = plan_of()
    labels = set(plan.all_labels())
    model, calibration = (plan.labels[section]["demo"] for section in ("models", "calibrations"))
    for name in (
        f"{model}/model.json",
        f"{model}/{calibration}/old-abcdef/x/allocation.json",
        f"{model}/tokens/gone-123456.safetensors",
        f"{model}/dense/gone-123456.states.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    (tmp_path / "logs" / "compress" / "old-abcdef").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "summary.csv").write_text("x")
    bundle = tmp_path / model / calibration / "statistics" / "moments"
    write_tensors(bundle / "layer-000.safetensors", {"x": torch.ones(2)})
    write_tensors(bundle / "inner-fedcba.safetensors", {"x": torch.ones(2)})
    write_manifest(bundle, {}, {})
    found = dict(unreached(tmp_path, labels))
    assert found == {
        tmp_path / model / calibration / "old-abcdef": 5,
        tmp_path / model / "tokens" / "gone-123456.safetensors": 5,
        tmp_path / model / "dense" / "gone-123456.states.safetensors": 5,
        tmp_path / "logs" / "compress" / "old-abcdef": 0,
    }
    for path in found:
        remove(path)
    assert dict(unreached(tmp_path, labels)) == {}
    assert (bundle / "manifest.json").is_file()
    assert (tmp_path / model / "model.json").is_file()
