"""Gradients of a model that is run block by block are those of a model in memory, after a kill too."""

import pytest
import torch

from tests.unit.test_streaming import BATCH, CAUSAL, LENGTH, PROVENANCE, WINDOWS, assert_same, dense, held, matrices_of  # noqa: F401
from winnow.calibration import gradients_by_block
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.gradients_by_block import collect_gradients_by_block
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed
from winnow.errors import InputError


def options_of(folder, labels="model", first_token=False):
    return (matrices_of(folder), WINDOWS, BATCH, torch.float64, labels, 3, first_token)


CASES = [(name, labels) for name in CAUSAL for labels in ("model", "text")] + [("bert_masked", "model")]


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_gradients_are_those_of_a_model_in_memory(dense, name, labels, tmp_path, monkeypatch):  # noqa: F811
    folder = dense(name)
    monkeypatch.setattr(gradients_by_block, "LOGITS", 5 * 64)  # a few tokens at a time
    options = options_of(folder, labels)
    expected = dict(collect_gradients(load_model(folder, "float64", "cpu"), *options))
    streamed = Streamed(folder, "float64", "cpu", tmp_path / "artefact", LENGTH)
    sizes = []
    for block in streamed.blocks.values():
        block.register_forward_hook(lambda *_: sizes.append(held(streamed)))
    found = dict(collect_gradients_by_block(streamed, *options))
    assert list(found) == sorted(expected, reverse=True)
    assert_same(dict(sorted(found.items())), expected)
    inside = [sum(p.numel() for p in block.parameters()) for block in streamed.blocks.values()]
    assert max(sizes) <= sum(p.numel() for p in streamed.model.parameters()) - min(inside), "never more than one block"
    assert not list(tmp_path.iterdir()), "hidden states are removed"


def test_heads_that_do_not_work_token_by_token_are_refused(dense, tmp_path):  # noqa: F811
    cases = {"bert_classifier": "does not predict token by token", "bert_encoder": "BertModel has no logits"}
    for name, message in cases.items():
        for labels, line in (("model", message), ("text", "does not predict the text's next tokens")):
            streamed = Streamed(dense(name), "float32", "cpu", tmp_path / "artefact", LENGTH)
            with pytest.raises(InputError, match=line):
                list(collect_gradients_by_block(streamed, *options_of(dense(name), labels)))


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 5, 9, 13, 20, 30, 35])
def test_a_killed_job_goes_on_with_the_same_bits(dense, calls, tmp_path, monkeypatch):  # noqa: F811
    """It dies within one of the passes over a block, and goes on with what was complete."""
    folder = dense("llama")
    options = options_of(folder)

    def job() -> Streamed:
        return Streamed(folder, "float32", "cpu", tmp_path / "artefact", LENGTH)

    def passes(streamed: Streamed) -> list[int]:
        seen: list[int] = []
        for layer, block in streamed.blocks.items():
            block.register_forward_hook(lambda *_, layer=layer: seen.append(layer))
        return seen

    streamed = job()
    of_whole = passes(streamed)
    whole = dict(collect_gradients_by_block(streamed, *options))
    streamed = job()
    seen, found = passes(streamed), {}

    def die(*_):
        if len(seen) == min(calls, len(of_whole) - 1):
            raise Killed

    for block in streamed.blocks.values():
        block.register_forward_hook(die)
    with pytest.raises(Killed):
        for layer, roles in collect_gradients_by_block(streamed, *options, PROVENANCE):
            found[layer] = roles
    streamed = job()
    of_rest = passes(streamed)
    rest = dict(collect_gradients_by_block(streamed, *options, PROVENANCE, list(found)))
    assert found.keys() | rest.keys() == whole.keys()
    for layer, roles in (found | rest).items():
        for role, values in roles.items():
            assert all(torch.equal(values[key], value) for key, value in whole[layer][role].items())
    assert len(of_rest) <= len(of_whole)
    if calls > 12:
        assert len(of_rest) < len(of_whole), "what was complete is not done again"
    assert not list(tmp_path.iterdir())


def test_damaged_or_foreign_states_are_not_used(dense, tmp_path):  # noqa: F811
    folder = dense("llama")
    options = options_of(folder)
    whole = dict(collect_gradients_by_block(Streamed(folder, "float32", "cpu", tmp_path / "a", LENGTH), *options))
    for provenance, damage in ((PROVENANCE, True), ({"rule": "another"}, False)):
        found = {}
        for layer, roles in collect_gradients_by_block(
            Streamed(folder, "float32", "cpu", tmp_path / "a", LENGTH), *options, PROVENANCE
        ):
            found[layer] = roles
            break  # one layer; its gradient is not stored yet
        left = sorted(tmp_path.glob(".a.hidden-*"))
        assert left
        if damage:
            for path in left:
                path.write_bytes(path.read_bytes()[:-1] + b"x")
        again = Streamed(folder, "float32", "cpu", tmp_path / "a", LENGTH)
        rest = dict(collect_gradients_by_block(again, *options, provenance, list(found)))
        assert all(torch.equal(rest[0]["q_proj"][key], value) for key, value in whole[0]["q_proj"].items())
        assert not list(tmp_path.iterdir())
