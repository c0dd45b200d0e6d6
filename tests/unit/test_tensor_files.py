"""Safetensors files written and read tensor by tensor are those of safetensors itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from winnow.errors import InputError
from winnow.io.artifacts import read_json, read_tensors, write_json, write_tensors
from winnow.io.symmetric import halved, symmetric
from winnow.io.tensors import NAMES, Spool, TensorFile
from winnow.models.weights import write_weights

TENSORS = {
    "b.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.labels": torch.arange(7, dtype=torch.uint8),
    "a.count": torch.tensor(3),
    "c.half": torch.ones(3, 3, dtype=torch.bfloat16),
    "a.empty": torch.zeros(0, 4),
    "c.ä": torch.ones(5, dtype=torch.float16),
    "d.mask": torch.tensor([True, False, True]),
    "a.transposed": torch.arange(6.0).reshape(2, 3).T,
}


def test_the_bytes_are_those_of_safetensors(tmp_path):
    spool = Spool(tmp_path / ".spool")
    for name, tensor in TENSORS.items():
        spool.add(name, tensor)
    spool.finish(tmp_path / "ours.safetensors", {"format": "pt"})
    save_file({k: t.contiguous() for k, t in TENSORS.items()}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


@pytest.mark.parametrize("name", NAMES.values())
def test_every_dtype_comes_back(name, tmp_path):
    tensor = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(getattr(torch, name))
    save_file({"x": tensor, "scalar": tensor[1, 0].clone()}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    assert torch.equal(file.read("x"), tensor)
    assert file.read("x").dtype == tensor.dtype
    assert torch.equal(file.read("scalar"), tensor[1, 0])


def test_numbers_are_converted_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr("winnow.io.tensors.CHUNK", 7)
    tensor = torch.randn(5, 9).bfloat16()
    save_file({"x": tensor, "none": torch.zeros(0, 3)}, tmp_path / "file")
    found = TensorFile(tmp_path / "file").read("x", torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor.float())
    assert TensorFile(tmp_path / "file").read("none", torch.float16).shape == (0, 3)


def test_a_file_that_ends_early_is_refused(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[:-3])
    with pytest.raises(InputError, match="it ends within x"):
        file.read("x")


def test_weights_are_cut_into_shards_by_bytes(tmp_path):
    total = write_weights(tmp_path, iter(TENSORS.items()), 60)
    assert total == sum(t.nbytes for t in TENSORS.values())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == total
    found = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / file)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 60
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert not (tmp_path / ".spool").exists()


def test_some_tensors_of_a_file(tmp_path):
    write_tensors(tmp_path / "file.safetensors", TENSORS, {"provenance": {}}, sealed=True)
    found, metadata = read_tensors(tmp_path / "file.safetensors", sealed=True, names=["a.count", "c.half"])
    assert set(found) == {"a.count", "c.half"}
    assert metadata == {"provenance": {}}


@pytest.mark.parametrize("place", [-1, 0, 1, 13, 14, 77, 78])
def test_a_seal_is_found_wherever_chunks_end(place, tmp_path, monkeypatch):
    """The mark, and the digest behind it, may lie across two chunks."""
    write_json(tmp_path / "file", {"a": "x" * 500})
    mark = (tmp_path / "file").read_bytes().index(b"winnow-sha256:")
    for chunk in (mark + place, 100, 15):
        monkeypatch.setattr("winnow.io.artifacts.CHUNK", chunk)
        assert read_json(tmp_path / "file") == {"a": "x" * 500}
        write_json(tmp_path / "again", {"a": "x" * 500})
        assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    data = bytearray((tmp_path / "file").read_bytes())
    for byte in (0, mark - 5, mark + 20, len(data) - 1):
        damaged = data.copy()
        damaged[byte] ^= 1
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(InputError, match="changed since it was written"):
            read_json(tmp_path / "file")


@pytest.mark.parametrize("n", [1, 2, 255, 256, 700])
def test_a_symmetric_matrix_comes_back_from_its_half(n, tmp_path):
    made = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    tensors = {"a.gram": made + made.T, "a.mean": made[0]}
    path = tmp_path / "x.safetensors"
    write_tensors(path, halved(tensors, ("gram",)))
    assert path.stat().st_size < 8 * (n * (n + 1) // 2 + n) + 500
    found = read_tensors(path)[0]
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert read_tensors(path, names=["a.gram"])[0].keys() == {"a.gram"}
    with pytest.raises(ValueError, match="4 numbers are not a triangle"):
        symmetric(torch.ones(4))
