"""Neurons taken one by one: the same order as by the definition, on Grams of every kind, at no more than cubic cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.test_forecast import DEMO
from tests.unit.test_plan import plan_of
from winnow.models.shape import shape_of
from winnow.numerics.neurons import by_gain
from winnow.planning.forecast import forecast


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden_units(seed, tokens, f):
    """(tokens, f): of mixed scale, in no order."""
    order = torch.randperm(f, generator=torch.Generator().manual_seed(seed))
    return normal(seed, tokens, f) * torch.logspace(0, -2, f, dtype=torch.float64)[order]


def one_by_one(weight, gram, rows):
    """The definition, with the whole of S, T and R in every step: d^2 f operations each."""
    left, targets = gram.clone(), weight @ gram
    rows = torch.eye(len(weight), dtype=torch.float64) if rows is None else rows
    floor = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().mean()
    order = []
    while len(order) < len(gram):
        gained = ((rows @ targets) * targets).sum(0) / left.diagonal()
        gained[(left.diagonal() <= floor) | torch.isin(torch.arange(len(gram)), torch.tensor(order))] = -torch.inf
        if gained.max() == -torch.inf:
            return order + [j for j in range(len(gram)) if j not in order]
        best = int(gained.argmax())
        order.append(best)
        share = left[best] / left[best, best]
        targets = targets - torch.outer(targets[:, best], share)
        left = left - torch.outer(left[:, best], share)
    return order


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_the_order_is_that_of_the_definition(seed, weighted):
    """Some of the Grams with neurons that never fired, some of fewer tokens than neurons: then the last one that is determined by
    all others is any of them, since they are of one direction."""
    d, f = (int(v) for v in torch.randint(2, 60, (2,), generator=torch.Generator().manual_seed(seed)))
    tokens = f // 2 + 1 if seed % 5 == 3 else 3 * f
    hidden, weight, g = hidden_units(seed, tokens, f), normal(seed + 100, d, f), normal(seed + 200, 2 * d, d)
    if seed % 5 == 4:
        hidden[:, :: 1 + seed % 3] = 0
        hidden[:, 0] = 1
    gram, rows = hidden.T @ hidden / tokens, g.T @ g / d if weighted else None
    found, expected = by_gain(weight, gram, rows).tolist(), one_by_one(weight, gram, rows)
    certain = min(tokens - 1, f)
    assert found[:certain] == expected[:certain]
    assert sorted(found) == list(range(f))
    if tokens > f:
        assert found == expected


def test_equal_neurons_are_taken_by_position_and_their_copies_last():
    hidden, weight = hidden_units(1, 200, 24), normal(2, 9, 24)
    for copy, of in ((5, 2), (11, 17), (23, 0)):
        hidden[:, copy], weight[:, copy] = hidden[:, of], weight[:, of]
    for rows in (None, normal(3, 9, 9) @ normal(3, 9, 9).T):
        order = by_gain(weight, hidden.T @ hidden / 200, rows).tolist()
        assert order[-3:] == [5, 17, 23]


def test_no_unit_is_left_out_and_none_fired_at_all():
    assert by_gain(normal(1, 3, 4), torch.zeros(4, 4, dtype=torch.float64), None).tolist() == [0, 1, 2, 3]


def test_the_operations_are_cubic():
    """Of products of matrices; what else there is, f^3 / 3 + 4 d f^2, is of products with vectors."""
    d, f = 32, 96
    gram, rows = (normal(seed, n, 2 * n) @ normal(seed, n, 2 * n).T / n for seed, n in ((1, f), (2, d)))
    weight = normal(3, d, f)
    with FlopCounterMode(display=False) as counted:
        by_gain(weight, gram, rows)
    assert counted.get_total_flops() <= 2 * d * f**2 + 2 * d**2 * f + 2 * d**3


def test_the_forecast_counts_them():
    def operations(method):
        def change(c):
            c["experiments"]["demo"].update(methods=[method], budgets=["ffn-0.8"])

        works = {w.stage: w for w in forecast(plan_of(change), {"demo": shape_of(DEMO)})}
        return works["factorize"].operations

    d, f, layers = 128, 352, 6
    more = operations("neurons_by_loss") - operations("modegpt_mlp")
    assert more >= layers * (f**3 / 3 + 4 * d * f**2)
    assert more < layers * 25 * f**3, "no more than an eigendecomposition of (f, f)"
