"""A long stage that was killed goes on where it was, with the same bits; a state of anything else is not used."""

import pytest
import torch

from tests.conftest import VOCABULARY, pico
from winnow.calibration import statistics
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect
from winnow.evaluation.perplexity import evaluate
from winnow.io.artifacts import write_json, write_manifest, write_tensors
from winnow.io.resume import SECONDS, Resume, own_files
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe

KEY = {"rule": "some", "params": {"spec": {"a": 1}}, "inputs": {"b": "c"}, "wildcards": {}}
WINDOWS = torch.randint(0, VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(0))
FIRST = torch.ones(len(WINDOWS), dtype=torch.int64)


class Killed(Exception):
    pass


class Fragile(Resume):
    """Dies at its second save."""

    saves = 0

    def save(self, done, sums):
        if self.saves == 1:
            raise Killed
        self.saves += 1
        super().save(done, sums)


@pytest.fixture
def stages(saved_llama, tmp_path, monkeypatch):
    """{stage: (its model, a function of `resume` that runs it and returns tensors)}"""
    monkeypatch.setenv(SECONDS, "0")
    monkeypatch.setattr(statistics, "TOGETHER", 1)
    write_json(tmp_path / "model.json", describe(saved_llama))
    model, other, matrices = pico("llama"), pico("llama", seed=1), ModelFiles(tmp_path / "model.json").matrices

    def flat(layers) -> dict:
        return {f"{n}.{where}.{key}": t for n, found in layers for where, values in found.items() for key, t in values.items()}

    return model, {
        "statistics": lambda resume: flat(collect(model, matrices, WINDOWS, 2, torch.float32, resume=resume)),
        "gradients": lambda r: flat(collect_gradients(model, matrices, WINDOWS, 2, torch.float32, "model", 0, resume=r)),
        "perplexity": lambda r: {k: torch.tensor(v) for k, v in evaluate(model, other, WINDOWS, FIRST, 2, r).items()},
    }


@pytest.mark.parametrize("stage", ["statistics", "gradients", "perplexity"])
def test_a_killed_stage_goes_on_with_the_same_bits(stages, stage, tmp_path):
    model, runs = stages
    whole = runs[stage](None)
    with pytest.raises(Killed):
        runs[stage](Fragile(tmp_path / "artefact", KEY))
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    base = model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    resume = Resume(tmp_path / "artefact", KEY)
    again = runs[stage](resume)
    hook.remove()
    base.remove()
    # three batches of four are left, five windows: in statistics and gradients by themselves; gradients also pass the head
    expected = {"statistics": 5, "gradients": 10, "perplexity": 6}[stage]
    assert len(passes) == expected
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    resume.clear()
    assert list(tmp_path.glob(".artefact*")) == []


@pytest.mark.parametrize("change", ["params", "inputs", "damage"])
def test_a_state_of_anything_else_is_not_used(stages, change, tmp_path):
    _, runs = stages
    whole = runs["statistics"](None)
    with pytest.raises(Killed):
        runs["statistics"](Fragile(tmp_path / "artefact", KEY))
    key = KEY if change == "damage" else KEY | {change: {"else": 1}}
    if change == "damage":
        path = next(tmp_path.glob(".artefact*"))
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    resume = Resume(tmp_path / "artefact", key)
    assert resume.load() == {}
    again = runs["statistics"](resume)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_saves_are_apart_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv(SECONDS, "3600")
    resume = Resume(tmp_path / "artefact", KEY)
    resume.save(1, {"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_bundle_keeps_the_files_of_the_same_job_only(tmp_path):
    other = KEY | {"params": {"spec": {"a": 2}}}
    for name, provenance in (("one", KEY), ("two", KEY), ("old", other)):
        write_tensors(tmp_path / f"{name}.safetensors", {"x": torch.ones(2)}, provenance)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-4])
    as_in_a_job = KEY | {"params": {"spec": {"a": 1}}, "wildcards": {}}
    assert own_files(tmp_path, as_in_a_job) == {"one.safetensors", "two.safetensors"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]
    write_manifest(tmp_path, {}, KEY)
    assert own_files(tmp_path, KEY) == set(), "a finished bundle is made anew"
