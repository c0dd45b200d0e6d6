"""Parts of a batch side by side: sums are the same with any number of threads, and an error ends them all."""

import time
from functools import partial

import pytest
import torch

from tests.conftest import VOCABULARY, pico
from tests.unit.test_statistics import files_of
from winnow.calibration import statistics
from winnow.calibration.statistics import collect
from winnow.calibration.threads import Lanes

PARTS = 5


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_parts_add_in_their_order(threads):
    """The later a part, the sooner it would add; the third adds nothing to the second sum, and ends first."""
    lanes, order = Lanes(PARTS), {"first": [], "second": []}

    def work(number):
        for name, found in order.items():
            if number != 2 or name == "first":
                time.sleep((PARTS - number) / 100)
                with lanes.turn(name):
                    found.append(number)

    lanes.run([partial(work, number) for number in range(PARTS)])
    assert order == {"first": [0, 1, 2, 3, 4], "second": [0, 1, 3, 4]}


def test_an_error_ends_all(threads):
    lanes, ran = Lanes(PARTS), []

    def work(number):
        with lanes.turn("first"):
            ran.append(number)
        if number == 1:
            time.sleep(0.01)
            raise FloatingPointError("layer 3, ffn_hidden")
        with lanes.turn("second"):
            ran.append(number)

    with pytest.raises(FloatingPointError, match="layer 3, ffn_hidden"):
        lanes.run([partial(work, number) for number in range(PARTS)])
    lanes.run([partial(ran.append, "again")] * 2)
    assert ran[-2:] == ["again", "again"]


def test_sums_do_not_depend_on_the_number_of_threads(saved_llama, tmp_path, monkeypatch):
    """Windows of ten tokens, some padded, in parts of two."""
    monkeypatch.setattr(statistics, "TOKENS", 20)
    files, model = files_of(saved_llama, tmp_path), pico("llama")
    windows = torch.randint(0, VOCABULARY, (9, 10), generator=torch.Generator().manual_seed(0))
    windows[2:5, 6:] = -1
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(dict(collect(model, files.matrices, windows, 7, torch.float32, first_token=False)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for layer, sites in found[0].items():
            for site, values in sites.items():
                for name, value in values.items():
                    assert torch.equal(value, other[layer][site][name]), (layer, site, name)
    assert int(found[0][0]["ffn_input"]["count"]) == 9 * 9 - 3 * 4


def test_what_a_part_meets_is_raised_with_its_layer(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "TOKENS", 20)
    files, model = files_of(saved_llama, tmp_path), pico("llama")
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _m, _a: (_ for _ in ()).throw(RuntimeError("layer 1 is gone")))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="layer 1 is gone"):
            list(collect(model, files.matrices, torch.zeros(8, 10, dtype=torch.long), 8, torch.float32))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("tokens", "batch", "most", "parts"), [(20, 7, 6, [2, 2, 2, 2, 1]), (5, 1, 1, [1] * 9), (1000, 2, 2, [1] * 9)]
)
def test_no_more_windows_run_at_a_time_than_a_batch_has(saved_llama, tmp_path, monkeypatch, tokens, batch, most, parts):
    """Nine windows of ten tokens; windows longer than a part, and batches smaller than one, included."""
    monkeypatch.setattr(statistics, "TOKENS", tokens)
    files, model = files_of(saved_llama, tmp_path), pico("llama")
    running, highest, seen = [0], [0], []

    def enter(_module, _args, given):
        running[0] += len(given["input_ids"])
        highest[0] = max(highest[0], running[0])
        seen.append(len(given["input_ids"]))
        time.sleep(0.02)

    def leave(*_):
        running[0] -= seen[0]

    model.base_model.register_forward_pre_hook(enter, with_kwargs=True)
    model.base_model.register_forward_hook(leave, always_call=True)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        list(collect(model, files.matrices, torch.zeros(9, 10, dtype=torch.long), batch, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == sorted(parts)
    assert highest[0] <= most <= batch
