"""The loss loop against hand computation, transformers' own loss, and itself in other batches."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from tests.conftest import VOCABULARY, pico
from winnow.calibration.gradients import sampled
from winnow.data.tokens import PAD
from winnow.evaluation.perplexity import _score, evaluate, summarize_windows
from winnow.evaluation.spread import ratio


class Fixed(nn.Module):
    """A model over three tokens whose logits depend on the input token alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, input_ids, use_cache):
        return CausalLMOutput(logits=self.table[input_ids])


def test_three_tokens_by_hand():
    model = Fixed([[0.0, math.log(2.0), 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    dense = Fixed([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0], [1.0, 0.0, 0.0]])
    rows = evaluate(model, dense, torch.tensor([[0, 1, 2]]), torch.tensor([1]), 1)
    assert rows["tokens"] == [2.0]
    assert rows["nll"][0] == pytest.approx(-math.log(2 / 4) - math.log(1 / 3), rel=1e-6)
    uniform_kl = math.log(4) - (math.log(1) + math.log(2) + math.log(1)) / 3 - math.log(3)
    e5 = math.exp(5.0)
    p = [1 / (2 + e5), 1 / (2 + e5), e5 / (2 + e5)]
    peaked_kl = sum(x * math.log(3 * x) for x in p)
    assert rows["kl"][0] == pytest.approx(uniform_kl + peaked_kl, rel=1e-6)
    assert rows["agree"] == [0.0], "argmax 0 against 1, then 2 against 0"
    assert evaluate(dense, dense, torch.tensor([[0, 1, 2]]), torch.tensor([1]), 1)["agree"] == [2.0]


def test_agrees_with_transformers_and_with_any_batch():
    model, dense = pico("llama"), pico("llama", seed=1)
    ids = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    first = torch.ones(5, dtype=torch.int32)
    one = evaluate(model, dense, ids, first, 1)
    all_at_once = evaluate(model, dense, ids, first, 8)
    for key in one:
        assert one[key] == pytest.approx(all_at_once[key], rel=1e-5)
    with torch.no_grad():
        loss = model(input_ids=ids.long(), labels=ids.long()).loss
    assert summarize_windows(one, None)["nll"] == pytest.approx(float(loss), rel=1e-6)


def test_padded_last_window_scores_only_its_tokens():
    model = pico("llama")
    ids = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    short = ids.clone()
    short[2, 6:] = PAD
    rows = evaluate(model, None, short, torch.tensor([1, 4, 4]), 4)
    assert rows["tokens"] == [9.0, 6.0, 2.0]
    with torch.no_grad():
        q = model(input_ids=ids[2:3, :6].long()).logits[0, 3:5].double().log_softmax(-1)
    assert rows["nll"][2] == pytest.approx(-float(q.gather(1, ids[2, 4:6, None].long()).sum()), rel=1e-6)


def test_a_logit_that_is_not_finite_stops_with_the_modules_name():
    model = pico("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.up_proj"):
        evaluate(model, None, ids, torch.ones(2, dtype=torch.int32), 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_is_enough(value):
    """Also where it would not show in the loss, as -inf."""
    table = torch.zeros(4, 50)
    table[1, 7] = value
    ids = torch.tensor([[0, 2, 3], [0, 1, 2]])
    with pytest.raises(FloatingPointError, match="windows 1 to 1"):
        evaluate(Fixed(table.tolist()), None, ids, torch.ones(2, dtype=torch.int32), 1)


def test_standard_error_is_that_of_the_mean_of_equal_windows():
    sums, counts = np.array([10.0, 14.0, 9.0, 12.0]), np.full(4, 5.0)
    mean, error = ratio(sums, counts)
    assert mean == pytest.approx(sums.sum() / 20)
    assert error == pytest.approx((sums / 5).std(ddof=1) / 2)


def test_differences_are_paired():
    dense = {"per_window": {"nll": [10.0, 20.0, 30.0], "tokens": [9.0, 9.0, 9.0]}}
    result = summarize_windows({"nll": [19.0, 29.0, 39.0], "tokens": [9.0, 9.0, 9.0]}, dense)
    assert result["delta_nll"] == pytest.approx(1.0)
    assert result["delta_nll_se"] == pytest.approx(0.0, abs=1e-12)
    assert result["nll_se"] > 0.5
    with pytest.raises(ValueError, match="other windows"):
        summarize_windows({"nll": [1.0, 2.0, 3.0], "tokens": [9.0, 9.0, 8.0]}, dense)


def test_tokens_are_scored_and_drawn_in_parts_of_any_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    own, dense = torch.randn(2, 7, 50, generator=generator)
    targets, draws = torch.randint(0, 50, (7,), generator=generator), torch.rand(7, 1, generator=generator, dtype=torch.float64)
    whole, labels = _score(own, targets, dense), sampled(dense, draws)
    p, q = dense.double().log_softmax(-1), own.double().log_softmax(-1)
    assert whole["kl"] == pytest.approx(float(nn.functional.kl_div(q, p, reduction="sum", log_target=True)), rel=1e-12)
    assert whole["nll"] == pytest.approx(float(nn.functional.nll_loss(q, targets, reduction="sum")), rel=1e-12)
    assert _score(dense, targets, dense)["kl"] == 0
    monkeypatch.setattr("winnow.numerics.logits.ON_CPU", 120)  # two tokens at once
    assert _score(own, targets, dense) == pytest.approx(whole, rel=1e-12)
    assert torch.equal(sampled(dense, draws), labels)
