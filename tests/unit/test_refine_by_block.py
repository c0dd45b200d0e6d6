"""Refinement of models whose blocks are read when they are needed: the same bits as in memory, one block at a time, and a killed
job goes on after the last finished block."""

import pytest
import torch
from safetensors.torch import load_file

import winnow
from tests.conftest import FAMILIES
from tests.unit.test_outer import ALL, rounded
from tests.unit.test_recovery import JOB, KEY, KINDS, WINDOWS, Fragile, Killed, compressed, files_of
from tests.unit.test_rounded_recovery import checkpoint_of
from winnow.checkpoint.streaming import Streamed
from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, Bundle
from winnow.io.resume import Resume
from winnow.recovery import refine
from winnow.recovery.base import recovery_of
from winnow.recovery.recover import given_of, write_recovered


def refined(files, checkpoint, options, folder, stream=True, resume=Resume):
    """(the tensors that are written, the report)"""
    recovery = recovery_of(options)
    saved = resume(folder / "out", KEY)
    given = given_of(files, checkpoint, WINDOWS, recovery.options, True, "cpu", saved, None, stream)
    report = recovery.recover(given)
    write_recovered(folder / "out", files, checkpoint, given, {"name": "mine", **options}, report, JOB)
    saved.clear()
    assert not list(folder.glob(".*")), "nothing is left beside the checkpoint"
    return load_file(folder / "out" / "model.safetensors"), report


def same(one, other) -> bool:
    return one[1] == other[1] and set(one[0]) == set(other[0]) and all(torch.equal(t, other[0][k]) for k, t in one[0].items())


@pytest.mark.parametrize("name", ["refine", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_in_memory(family, name, tmp_path):
    files, checkpoint = compressed(family)
    found = [refined(files, checkpoint, KINDS[name], tmp_path / str(stream), stream) for stream in (False, True)]
    assert same(*found)
    before = load_file(checkpoint.directory / "model.safetensors")
    assert any(not torch.equal(before[key], tensor) for key, tensor in found[1][0].items())


def test_rounded_matrices(saved_llama, tmp_path):
    files, checkpoint = files_of(saved_llama, tmp_path), checkpoint_of(saved_llama, tmp_path / "work")
    options = KINDS["refine"] | {"code_rate": 0.02, "norms": True}
    found = [refined(files, checkpoint, options, tmp_path / str(stream), stream) for stream in (False, True)]
    assert same(*found)
    before = load_file(checkpoint.directory / "model.safetensors")
    assert {key.rpartition(".")[2] for key in before if not torch.equal(before[key], found[1][0][key])} >= {"scale", "steps"}


def test_factors_of_several_blocks_and_rounded_embeddings_stay(saved, tmp_path):
    shared = compressed("llama", "basis_sharing")
    source = saved("llama")
    folder = winnow.compress(source, WINDOWS, rounded(3), 0.2, targets=ALL, nearest=True).save(tmp_path / "checkpoint")
    outer = files_of(source, tmp_path), Bundle(folder / MANIFEST)
    for name, (files, checkpoint) in {"shared": shared, "outer": outer}.items():
        found = [refined(files, checkpoint, KINDS["refine"], tmp_path / f"{name}{stream}", stream) for stream in (False, True)]
        assert same(*found)
        before = load_file(checkpoint.directory / "model.safetensors")
        changed = {key for key, tensor in found[1][0].items() if not torch.equal(before[key], tensor)}
        assert changed
        assert all(key.startswith("model.layers.") for key in changed)


def test_the_dense_model_is_refined_from_itself(tmp_path):
    """At a loss of 0 nothing changes."""
    files, _ = compressed("llama")
    found = [refined(files, None, KINDS["refine"], tmp_path / str(stream), stream) for stream in (False, True)]
    assert same(*found)


def test_one_block_of_each_model_is_in_memory(tmp_path, monkeypatch):
    files, checkpoint = compressed("llama")
    held, most = {}, []
    loaded, unload = Streamed._load, Streamed._unload

    def load(self, name, module, read):
        loaded(self, name, module, read)
        if any(name.startswith(f"{block}.") for block in self.names.values()):
            held.setdefault(id(self), set()).add(".".join(name.split(".")[:3]))
        most.append(max(map(len, held.values()), default=0))

    def free(self, module):
        unload(self, module)
        held.pop(id(self), None)

    monkeypatch.setattr(Streamed, "_load", load)
    monkeypatch.setattr(Streamed, "_unload", free)
    refined(files, checkpoint, KINDS["refine"], tmp_path)
    assert max(most) == 1


@pytest.mark.parametrize("name", ["refine", "shifted"])
def test_a_killed_job_goes_on_with_the_same_bits(name, tmp_path, monkeypatch):
    files, checkpoint = compressed("llama")
    whole = refined(files, checkpoint, KINDS[name], tmp_path / "whole")
    with pytest.raises(Killed):
        refined(files, checkpoint, KINDS[name], tmp_path / "again", resume=Fragile)
    trained, real = [], refine._refined
    monkeypatch.setattr(refine, "_refined", lambda given, index, *rest: trained.append(index) or real(given, index, *rest))
    assert same(whole, refined(files, checkpoint, KINDS[name], tmp_path / "again"))
    assert trained == [1], "the first block is not trained again"


def test_blocks_behind_one_that_is_trained_again_are_trained_again(tmp_path, monkeypatch):
    """They were trained on the outputs of another state of it."""
    files, checkpoint = compressed("llama")
    whole = refined(files, checkpoint, KINDS["refine"], tmp_path / "whole")
    saved, trained, real = Resume(tmp_path / "again" / "out", KEY), [], refine._refined
    given = given_of(files, checkpoint, WINDOWS, recovery_of(KINDS["refine"]).options, True, "cpu", saved, None, True)
    recovery_of(KINDS["refine"]).recover(given)
    first = saved._of("model.layers.0")
    first.write_bytes(first.read_bytes()[:-3])
    monkeypatch.setattr(refine, "_refined", lambda given, index, *rest: trained.append(index) or real(given, index, *rest))
    assert same(whole, refined(files, checkpoint, KINDS["refine"], tmp_path / "again"))
    assert trained == [0, 1]


def test_a_finished_block_that_is_lost_stops_the_job(tmp_path):
    """Instead of giving the block as it was before."""
    files, checkpoint = compressed("llama")
    recovery, saved = recovery_of(KINDS["refine"]), Resume(tmp_path / "out", KEY)
    given = given_of(files, checkpoint, WINDOWS, recovery.options, True, "cpu", saved, None, True)
    report = recovery.recover(given)
    saved._of("model.layers.1").unlink()
    with pytest.raises(InputError, match=r"out\.state-model\.layers\.1: lost or damaged while in use; run snakemake again"):
        write_recovered(tmp_path / "out", files, checkpoint, given, {"name": "mine"}, report, JOB)


def test_some_layers(tmp_path):
    files, checkpoint = compressed("llama")
    before = load_file(checkpoint.directory / "model.safetensors")
    for layers in ([1], [0]):
        options = KINDS["refine"] | {"layers": layers}
        found = [refined(files, checkpoint, options, tmp_path / f"{layers}{stream}", stream) for stream in (False, True)]
        assert same(*found)
        changed = {key for key, tensor in found[0][0].items() if not torch.equal(before[key], tensor)}
        assert changed
        assert all(key.startswith(f"model.layers.{layers[0]}.") for key in changed)
        assert list(found[0][1]["blocks"]) == [f"model.layers.{layers[0]}"]


def test_layers_that_the_model_does_not_have(tmp_path):
    files, checkpoint = compressed("llama")
    with pytest.raises(InputError, match=r"recovery: layers \[7\] of `layers` are not in the model, which has 0 to 1"):
        refined(files, checkpoint, KINDS["refine"] | {"layers": [0, 7]}, tmp_path)
