"""The dense model's hidden states, kept once, give the logits that the model gives."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import pico
from tests.unit.test_streaming import BATCH, CAUSAL, FIRST, LENGTH, PADDED, PROVENANCE, Killed
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed, clear_left
from winnow.errors import InputError
from winnow.evaluation.hidden import OTHERS, Compared, Keeper
from winnow.evaluation.perplexity import evaluate, evaluate_by_block
from winnow.io.hidden_states import read_hidden, write_hidden
from winnow.io.resume import SECONDS, Resume


def compared(folder, states, tmp_path, dtype="float32") -> Compared:
    files = SimpleNamespace(verify=lambda: folder)
    return Compared(files, states, dtype, "cpu", tmp_path / "compared", False)  # type: ignore[arg-type]


def keep(folder, tmp_path, by_block: bool, dtype="float32"):
    """(path of the states of PADDED, losses of the model)"""
    path, place = tmp_path / f"{by_block}.safetensors", (tmp_path / "dense", LENGTH)
    if by_block:
        keeper = Streamed(folder, dtype, "cpu", *place)
        rows = evaluate_by_block(keeper, None, PADDED, FIRST, BATCH)
    else:
        model = load_model(folder, dtype, "cpu")
        keeper = Keeper(model, place[0], len(PADDED), LENGTH)
        rows = evaluate(model, None, PADDED, FIRST, BATCH, None, keeper)
    write_hidden(path, keeper.stored, len(PADDED), {OTHERS: keeper.others})
    clear_left(place[0])
    assert not list(tmp_path.glob(".dense*"))
    return path, rows


@pytest.mark.parametrize("name", CAUSAL)
def test_comparison_is_that_with_the_model(name, tmp_path):
    folder, other = tmp_path / "model", pico(name, seed=1)
    pico(name).save_pretrained(folder)
    expected = evaluate(other, load_model(folder, "float32", "cpu"), PADDED, FIRST, BATCH)
    for by_block in (False, True):
        path, rows = keep(folder, tmp_path, by_block)
        assert rows["nll"] == pytest.approx(evaluate(load_model(folder, "float32", "cpu"), None, PADDED, FIRST, BATCH)["nll"])
        found = evaluate(other, compared(folder, path, tmp_path), PADDED, FIRST, BATCH)
        assert found == expected if not by_block else found["kl"] == pytest.approx(expected["kl"], abs=1e-5)
    other.save_pretrained(tmp_path / "other")
    streamed = Streamed(tmp_path / "other", "float32", "cpu", tmp_path / "result", LENGTH)
    found = evaluate_by_block(streamed, compared(folder, path, tmp_path).streamed, PADDED, FIRST, BATCH)
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-5)


def test_states_have_the_dtype_of_the_model(tmp_path):
    pico("llama").save_pretrained(tmp_path / "model")
    path, _ = keep(tmp_path / "model", tmp_path, False, "bfloat16")
    states, metadata = read_hidden(path)
    assert (states.dtype, metadata) == (torch.bfloat16, {OTHERS: None})
    assert path.stat().st_size - states.start == PADDED.numel() * states.width * 2


@pytest.mark.parametrize("damage", [None, "changed", "short", "missing"])
def test_a_killed_job_goes_on_with_the_states_that_it_has(damage, tmp_path, monkeypatch):
    monkeypatch.setenv(SECONDS, "0")
    folder = tmp_path / "model"
    pico("llama").save_pretrained(folder)
    expected, rows = keep(folder, tmp_path, False)
    passed: list[int] = []

    def job(last: int | None):
        model, resume = load_model(folder, "float32", "cpu"), Resume(tmp_path / "dense", PROVENANCE)
        monkeypatch.setattr("winnow.io.resume.SHARE", 0)
        keeper = Keeper(model, tmp_path / "dense", len(PADDED), LENGTH)

        def count(*_):
            if len(passed) == last:
                raise Killed
            passed.append(1)

        model.register_forward_pre_hook(count)
        return evaluate(model, None, PADDED, FIRST, BATCH, resume, keeper), keeper

    with pytest.raises(Killed):
        job(2)
    [left] = tmp_path.glob(".dense.hidden*")
    if damage == "changed":
        data = bytearray(left.read_bytes())
        data[5] ^= 1
        left.write_bytes(data)
    elif damage == "short":
        left.write_bytes(left.read_bytes()[:-4])
    elif damage == "missing":
        left.unlink()
    passed.clear()
    found, keeper = job(None)
    assert found == rows
    whole = -(-len(PADDED) // BATCH)
    assert len(passed) >= whole if damage else len(passed) < whole
    write_hidden(tmp_path / "again.safetensors", keeper.stored, len(PADDED), {OTHERS: keeper.others})
    assert (tmp_path / "again.safetensors").read_bytes() == expected.read_bytes()


def test_a_job_that_streamed_is_done_again_whole(tmp_path, monkeypatch):
    """What a streamed job has reached is of no use where the states are those of a model in memory."""
    monkeypatch.setenv(SECONDS, "0")
    pico("llama").save_pretrained(tmp_path / "model")
    model, resume = load_model(tmp_path / "model", "float32", "cpu"), Resume(tmp_path / "dense", PROVENANCE)
    expected = evaluate(model, None, PADDED, FIRST, BATCH, resume)
    keeper = Keeper(model, tmp_path / "dense", len(PADDED), LENGTH)
    assert evaluate(model, None, PADDED, FIRST, BATCH, resume, keeper) == expected
    assert keeper.stored is not None


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_losses_of_routers_are_left_out(name, tmp_path):
    dense, other = pico(name), pico(name, seed=1)
    dense.config.output_router_logits = True
    dense.save_pretrained(tmp_path / "model")
    expected = evaluate(other, load_model(tmp_path / "model", "float32", "cpu"), PADDED, FIRST, BATCH)
    path, _ = keep(tmp_path / "model", tmp_path, False)
    assert evaluate(other, compared(tmp_path / "model", path, tmp_path), PADDED, FIRST, BATCH) == expected


def test_damaged_states_are_refused(tmp_path):
    pico("llama").save_pretrained(tmp_path / "model")
    path, _ = keep(tmp_path / "model", tmp_path, False)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"False\.safetensors"):
        compared(tmp_path / "model", path, tmp_path)


def test_an_evaluation_that_does_not_compare_keeps_none(tmp_path):
    write_hidden(tmp_path / "none.safetensors", None, 4, {})
    assert (tmp_path / "none.safetensors").stat().st_size < 500
