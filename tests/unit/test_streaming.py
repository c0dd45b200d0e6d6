"""A model run block by block from files gives what it gives in memory, after a kill too."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FAMILIES, TINY, VOCABULARY, pico
from tests.unit.test_checkpoint import build, targets_of
from tests.unit.worlds import FITTED
from winnow.calibration.statistics import collect, collect_by_block
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import NAMES, Streamed, clear_left
from winnow.errors import InputError
from winnow.evaluation.perplexity import evaluate, evaluate_by_block
from winnow.io.artifacts import write_json
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe

LENGTH, BATCH = 12, 2
WINDOWS = torch.randint(0, VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(0))
PADDED = WINDOWS.clone()
PADDED[3:, 7:] = -1  # two windows that are shorter
FIRST = torch.tensor([1, 4, 1, 1, 5])
LAST = 1e-6  # largest difference, relative
PROVENANCE = {"rule": "some", "params": {"spec": {"a": 1}}}
CAUSAL = [name for name, (cls, options) in TINY.items() if "LM" in cls and (options.get("is_decoder") or "ert" not in name)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A function from the name of a tiny model to its directory, with its manifest beside it."""

    def saved(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "streamed" / name / "model"
        if not folder.exists():
            pico(name).save_pretrained(folder)
            write_json(folder.parent / "model.json", describe(folder))
        return folder

    return saved


def matrices_of(folder: Path):
    return ModelFiles(folder.parent / "model.json").matrices


def assert_same(found, expected):
    """Equal to 1e-6 of the largest number of a tensor."""
    assert found.keys() == expected.keys()
    for layer, sites in expected.items():
        assert found[layer].keys() == sites.keys()
        for site, values in sites.items():
            for name, value in values.items():
                scale = float(value.abs().max())
                difference = float((found[layer][site][name] - value).abs().max())
                assert difference <= LAST * scale, (layer, site, name, difference, scale)


def held(streamed: Streamed) -> int:
    return sum(p.numel() for p in streamed.model.parameters() if not p.is_meta)


@pytest.mark.parametrize("name", TINY)
def test_statistics_are_those_of_a_model_in_memory(dense, name, tmp_path):
    folder = dense(name)
    matrices = matrices_of(folder)
    options = (matrices, PADDED, BATCH, torch.float32, False)
    expected = dict(collect(load_model(folder, "float32", "cpu"), *options))
    streamed = Streamed(folder, "float32", "cpu", tmp_path / "artefact", LENGTH)
    sizes = []
    for block in streamed.blocks.values():
        block.register_forward_hook(lambda *_: sizes.append(held(streamed)))
    assert_same(dict(collect_by_block(streamed, *options)), expected)
    inside = [sum(p.numel() for p in block.parameters()) for block in streamed.blocks.values()]
    total = sum(p.numel() for p in streamed.model.parameters())
    assert max(sizes) <= total - min(inside), "never more than one block"
    assert held(streamed) < min(inside), "nothing of blocks and embeddings is left"
    assert streamed.prefix.with_name(f"{streamed.prefix.name}-1").is_file()
    streamed.clear()
    assert not list(tmp_path.iterdir())


def losses(model: Path, reference: Path | None, tmp_path: Path, dtype: str = "float32"):
    """(loss rows by block, those of models in memory)"""
    paths = [model, *([reference] if reference else [])]
    streamed = [Streamed(path, dtype, "cpu", tmp_path / "result", LENGTH, None, NAMES[i]) for i, path in enumerate(paths)]
    loaded = [load_model(path, dtype, "cpu") for path in paths]
    found = evaluate_by_block(streamed[0], streamed[1] if reference else None, PADDED, FIRST, BATCH)
    assert len(list(tmp_path.glob(".result*"))) == len(paths), "of the last block only"
    clear_left(tmp_path / "result")
    assert not list(tmp_path.glob(".result*"))
    return found, evaluate(loaded[0], loaded[1] if reference else None, PADDED, FIRST, BATCH)


def test_what_a_killed_job_left_is_removed_by_one_that_ends_whatever_way_it_went(tmp_path):
    """Of statistics and losses, and of gradients, whose states are at the inputs of several blocks."""
    names = ("hidden-0", "hidden.json", "compared-1", "hidden-input-12", "hidden-gradient-3")
    left = [f".manifest.json.{name}" for name in names]
    for name in (*left, "manifest.json", ".manifest.json.partial-7"):
        (tmp_path / name).touch()
    clear_left(tmp_path / "manifest.json")
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", ".manifest.json.partial-7"}


@pytest.mark.parametrize("name", CAUSAL)
def test_losses_are_those_of_a_model_in_memory(dense, name, tmp_path, monkeypatch):
    monkeypatch.setattr("winnow.evaluation.perplexity.STREAMED", 3 * VOCABULARY)  # three tokens at a time
    found, expected = losses(dense(name), None, tmp_path)
    assert found["tokens"] == expected["tokens"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=LAST)


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("name", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gpt_neox"))])
def test_compressed_models_stream_too(dense, name, kind, tmp_path):
    """Also those that share tensors between blocks; against the dense model, which is streamed beside it."""
    checkpoint = build(dense(name), tmp_path / "work", targets_of(kind), 0.6, kind)
    found, expected = losses(checkpoint, dense(name), tmp_path)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=LAST), key


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])  # the second has a scale in 16 bits
def test_in_16_bits_it_computes_in_them(dense, name, tmp_path):
    found, expected = losses(dense(name), None, tmp_path, "bfloat16")
    assert found["nll"] == pytest.approx(expected["nll"], rel=LAST)
    assert found["nll"] != pytest.approx(losses(dense(name), None, tmp_path)[0]["nll"], rel=1e-7)


class Killed(Exception):
    pass


def until_killed(streamed: Streamed, layers: int, options) -> dict:
    """Statistics of the first layers, of a process that dies within the next block."""
    found = {}
    with pytest.raises(Killed):
        for layer, sites in collect_by_block(streamed, *options):
            found[layer] = sites
            if len(found) == layers:
                after = list(streamed.blocks.values())[layers]

                def die(*_):
                    raise Killed

                after.register_forward_hook(die)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_killed_process_goes_on_at_its_block(dense, name, tmp_path):
    folder = dense(name)
    options = (matrices_of(folder), PADDED, BATCH, torch.float32, False)
    place = (folder, "float32", "cpu", tmp_path / "artefact", LENGTH)
    whole = dict(collect_by_block(Streamed(*place), *options))
    found = until_killed(Streamed(*place, PROVENANCE), 1, options)
    again = Streamed(*place, PROVENANCE)
    again.trust(found)
    assert again.remaining() == [1]
    rest = dict(collect_by_block(again, *options))
    found |= rest
    for layer, sites in whole.items():
        for site, values in sites.items():
            assert all(torch.equal(value, found[layer][site][key]) for key, value in values.items()), "the same bits"
    again.clear()
    assert not list(tmp_path.glob(".artefact*"))


@pytest.mark.parametrize("change", ["provenance", "hidden", "state", "lost", "results"])
def test_a_damaged_or_foreign_state_starts_over(dense, change, tmp_path):
    folder = dense("llama")
    options = (matrices_of(folder), WINDOWS, BATCH, torch.float32, False)
    place = (folder, "float32", "cpu", tmp_path / "artefact", LENGTH)
    found = until_killed(Streamed(*place, PROVENANCE), 1, options)
    hidden, state = (tmp_path / f".artefact.hidden{end}" for end in ("-0", ".json"))
    if change in ("hidden", "state"):
        path = hidden if change == "hidden" else state
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if change == "lost":
        hidden.unlink()
    again = Streamed(*place, {**PROVENANCE, "rule": "other"} if change == "provenance" else PROVENANCE)
    again.trust([] if change == "results" else found)
    assert again.remaining() == [0, 1]
    whole = dict(collect_by_block(Streamed(*place[:3], tmp_path / "whole", LENGTH), *options))
    assert_same(dict(collect_by_block(again, *options)), whole)


def test_a_killed_evaluation_goes_on_at_its_block(dense, tmp_path):
    place = (dense("llama"), "float32", "cpu", tmp_path / "result", LENGTH, PROVENANCE)
    expected = evaluate_by_block(Streamed(*place[:3], tmp_path / "whole", LENGTH), None, PADDED, FIRST, BATCH)
    first = Streamed(*place)

    def die(*_):
        if first.done == 1:
            raise Killed

    first.blocks[1].register_forward_hook(die)
    with pytest.raises(Killed):
        evaluate_by_block(first, None, PADDED, FIRST, BATCH)
    again = Streamed(*place)
    assert again.remaining() == [1]
    assert evaluate_by_block(again, None, PADDED, FIRST, BATCH) == expected
    after = Streamed(*place)
    assert after.remaining() == []
    assert evaluate_by_block(after, None, PADDED, FIRST, BATCH) == expected


def test_numbers_that_are_not_finite_name_the_block(dense, tmp_path):
    folder = tmp_path / "model"
    pico("llama").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    streamed = Streamed(folder, "float32", "cpu", tmp_path / "result", LENGTH)
    with pytest.raises(FloatingPointError, match=r"the output of model\.layers\.1 is not finite in windows 0 to 1"):
        evaluate_by_block(streamed, None, WINDOWS, FIRST, BATCH)


def test_files_that_lack_a_tensor_are_refused(tmp_path):
    folder = tmp_path / "model"
    pico("gpt2").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the tensor transformer\.h\.1\.mlp\.c_fc\.weight is missing"):
        Streamed(folder, "float32", "cpu", tmp_path / "artefact", LENGTH)
