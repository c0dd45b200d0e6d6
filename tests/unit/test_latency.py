"""The statistics of timings with clocks that are not clocks, counts against hand computation, and the fused forward passes."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import FAMILIES, pico
from winnow.errors import InputError
from winnow.evaluation.latency import (
    FASTER,
    SAME,
    SLOWER,
    Tally,
    compared,
    evaluate_latency,
    interleaved,
    interval,
    latency_verdict,
    quartiles,
    ratios,
    timed,
    weight_bytes,
)
from winnow.numerics import modules
from winnow.numerics.modules import RoundedLinear, reordered

SPEC = {"batches": [1, 3], "prompts": [5], "decode": 2, "repeats": 6, "warm_up": 1}


class Machine:
    """A clock that runs by what is called: every forward pass costs its model's `cost`, times a drift that hits all alike."""

    def __init__(self):
        self.now = 0.0
        self.drift = itertools.cycle([1.0, 3.0, 0.5, 7.0])

    def watch(self, model: nn.Module, cost: float) -> nn.Module:
        def spend(*_):
            self.now += cost

        model.register_forward_pre_hook(spend)
        return model

    def __call__(self, call) -> float:
        start = self.now
        call()
        return self.now - start


def test_dense_against_dense_is_one_and_a_slower_model_is_called_so():
    machine = Machine()
    dense, slower, faster = (machine.watch(pico("llama"), cost) for cost in (1.0, 1.25, 0.5))
    for model, expected, words in ((slower, 1.25, SLOWER), (faster, 0.5, FASTER), (dense, 1.0, SAME)):
        found = evaluate_latency(dense, model, SPEC, "cpu", machine)
        assert [(c["phase"], c["batch"]) for c in found["cases"]] == [
            ("prefill", 1),
            ("decode", 1),
            ("prefill", 3),
            ("decode", 3),
        ]
        for case in found["cases"]:
            assert case["control"]["ratio"]["median"] == 1.0
            assert case["control"]["verdict"] == SAME
            assert case["compressed"]["ratio"]["median"] == pytest.approx(expected)
            assert case["compressed"]["verdict"] == words
            tokens = case["batch"] * (5 if case["phase"] == "prefill" else 1)
            assert case["dense"]["tokens_per_second"] == pytest.approx(tokens)
            assert len(case["compressed"]["per_repeat"]) == 6


def test_a_dense_cell_has_its_control_alone():
    found = evaluate_latency(pico("llama"), None, {**SPEC, "batches": [1]}, "cpu")
    for case in found["cases"]:
        assert "compressed" not in case
        assert case["dense"]["seconds"]["q1"] <= case["dense"]["seconds"]["median"] <= case["dense"]["seconds"]["q3"]
        assert case["control"]["ratio"]["low"] <= case["control"]["ratio"]["median"] <= case["control"]["ratio"]["high"]


def test_repeats_are_interleaved_in_turned_order():
    order: list[str] = []
    slots = {name: lambda name=name: order.append(name) or {"forward": 1.0} for name in ("dense", "control", "compressed")}
    found = interleaved(slots, 3)
    assert order == [*slots, *reversed(slots), *slots]
    assert found["control"] == {"forward": [1.0] * 3}


def test_what_slows_all_down_for_a_while_is_in_no_ratio():
    """The machine changes its speed tenfold between repeats; paired ratios do not see it, ratios of medians would."""
    speed = [1.0, 1.0, 10.0, 10.0, 10.0, 2.0, 2.0]
    found = compared({"dense": speed, "control": speed, "compressed": [1.1 * s for s in speed]}, {}, 8)
    assert found["compressed"]["ratio"]["q1"] == pytest.approx(1.1)
    assert found["compressed"]["ratio"]["q3"] == pytest.approx(1.1)
    assert found["compressed"]["verdict"] == SLOWER


def test_verdicts_need_the_interval_and_the_control():
    quiet = ratios([1.0, 1.01, 0.99, 1.0, 1.0, 1.0, 1.0], [1.0] * 7)
    loud = ratios([0.7, 1.3, 0.8, 1.2, 1.0, 0.75, 1.25], [1.0] * 7)
    slower = ratios([1.1, 1.12, 1.09, 1.1, 1.11, 1.1, 1.1], [1.0] * 7)
    mixed = ratios([0.9, 1.2, 1.2, 1.2, 1.2, 0.9, 0.9], [1.0] * 7)
    assert latency_verdict(slower, quiet) == SLOWER
    assert latency_verdict(slower, loud) == SAME, "the machine cannot tell 10 % apart"
    assert latency_verdict(mixed, quiet) == SAME, "its own repeats do not agree"
    assert latency_verdict(ratios([0.8] * 7, [1.0] * 7), quiet) == FASTER


def test_interval_is_that_of_the_sign_test():
    """Order statistics of the binomial: n = 15 from the 4th (0.965), n = 9 from the 2nd (0.961), n = 6 the range (0.969)."""
    assert interval([float(v) for v in range(15)]) == (3.0, 11.0)
    assert interval([float(v) for v in range(9)]) == (1.0, 7.0)
    assert interval([5.0, 3.0, 1.0, 2.0, 4.0, 0.0]) == (0.0, 5.0)
    assert interval([2.0]) == (2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_the_first_call_of_a_slot_is_not_timed():
    machine, calls = Machine(), []

    def call():
        machine.now += 100.0 if not calls else 2.0
        calls.append(1)

    assert timed(call, machine, 4) == 2.0
    assert len(calls) == 5


def test_reads_flops_and_peak_by_hand():
    layer = nn.Sequential(nn.Linear(10, 6, bias=True), nn.Linear(6, 4, bias=False))
    x = torch.randn(3, 10)
    with torch.no_grad(), Tally(layer) as tally:
        layer(x)
    assert tally.weight_bytes == 4 * (60 + 6 + 24)
    assert tally.flops == 2 * 3 * (60 + 24)
    assert tally.peak == 4 * 3 * (6 + 4), "both results are there at once"
    assert weight_bytes(layer) == 4 * (60 + 6 + 24)
    for bits, read in ((8, 60), (4, 2 * 30)):  # the bytes of two numbers are read for the one and for the other
        rounded = RoundedLinear(10, 6, bits, 5, bias=False)
        with torch.no_grad(), Tally(rounded) as tally:
            rounded(x)
        assert tally.weight_bytes == read + 2 * 12
        assert tally.flops == 2 * 3 * 60, "also with a weight that is multiplied out"
    table = nn.Embedding(50, 8)
    with torch.no_grad(), Tally(table) as tally:
        table(torch.tensor([3, 4]))
    assert tally.weight_bytes == 2 * 8 * 4, "rows, not the table"


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_reads_every_weight_once(family):
    model = pico(family)
    found = evaluate_latency(model, None, {**SPEC, "batches": [1], "repeats": 1, "warm_up": 0}, "cpu")
    decode = found["cases"][1]["dense"]
    with torch.no_grad(), FlopCounterMode(display=False) as library:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    counts = {str(op): n for op, n in library.get_flop_counts()["Global"].items()}
    assert decode["flops"] == sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    assert linear <= decode["weight_bytes"] <= weight_bytes(model) + 1000
    assert decode["peak_bytes"] > weight_bytes(model)


def test_lengths_beyond_the_model_are_refused():
    with pytest.raises(InputError, match="prompts of 63 tokens and 2 \\+ 1 new ones exceed the 64 positions"):
        evaluate_latency(pico("llama"), None, {**SPEC, "prompts": [63]}, "cpu")


# Fused forward passes.


def products(module: nn.Module, *arguments) -> int:
    """Matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        module(*arguments)
    return counter.get_total_flops()


class Pair(nn.Module):
    """Three matrices that share a right factor, as a layer of `shared_basis` holds them."""

    def __init__(self, inputs: int = 12, rank: int = 5, outputs: int = 7):
        super().__init__()
        self.parts = nn.ModuleList(modules.LowRankLinear(inputs, outputs, rank, True, shared=True) for _ in range(3))
        for part in list(self.parts)[1:]:
            part.right = self.parts[0].right
            part.right.readers += 1

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], dim=-1)


def test_a_shared_factor_is_applied_once_and_gives_the_same_bits():
    module, x = Pair(), torch.randn(4, 12)
    expected = module(x)  # with gradients: every matrix computes its own
    with torch.no_grad():
        assert torch.equal(module(x), expected)
        assert products(module, x) == 2 * 4 * (12 * 5 + 3 * 5 * 7)
    assert products(module, x) == 2 * 4 * 3 * (12 * 5 + 5 * 7)
    assert module.parts[0].right._kept is None, "nothing is kept when all have read it"
    expected.sum().backward()
    assert module.parts[0].right.weight.grad is not None


@torch.no_grad()
def test_a_shared_factor_sees_every_change():
    """Another tensor of the same values, the same tensor changed, the weight changed, a pass that was cut short."""
    module = Pair()
    first, second, _ = module.parts
    x = torch.randn(4, 12)
    first(x)
    x.mul_(2)
    torch.testing.assert_close(
        second(x), nn.functional.linear(nn.functional.linear(x, second.right.weight), second.left.weight, second.left.bias)
    )
    first(x)
    first.right.weight.mul_(3)
    torch.testing.assert_close(
        second(x), nn.functional.linear(nn.functional.linear(x, second.right.weight), second.left.weight, second.left.bias)
    )
    other = torch.randn(4, 12)
    torch.testing.assert_close(
        second(other),
        nn.functional.linear(nn.functional.linear(other, second.right.weight), second.left.weight, second.left.bias),
    )
    with torch.inference_mode():
        y = torch.randn(4, 12)
        before = second(y)
        first(y)
        y.mul_(2)
        assert not torch.allclose(second(y), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(11,), (3, 11), (2, 3, 11)])
def test_reordered_is_a_permutation(dtype, shape):
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2)).to(torch.int16)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = reordered(x, order)
    assert torch.equal(y, x[..., order.long()])
    y.backward(torch.arange(11.0).to(dtype).expand(shape))
    assert torch.equal(x.grad, torch.arange(11.0).to(dtype)[order.long().argsort()].expand(shape))
