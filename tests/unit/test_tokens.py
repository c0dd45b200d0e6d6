"""Windows and protocols: every rule on a text of known tokens."""

import numpy as np
import pytest

from winnow.errors import InputError
from winnow.tokens import PAD, PROTOCOLS, calibration_windows, check_length, evaluation_windows

IDS = np.arange(100, 153, dtype=np.int32)  # 53 tokens


def scored(ids, first):
    return [int(t) for row, start in zip(ids, first, strict=True) for t in row[start:] if t != PAD]


@pytest.mark.parametrize("protocol", ["p1", "plain"])
def test_p1_drops_the_rest_and_scores_all_but_the_first(protocol):
    ids, first = evaluation_windows(IDS, protocol, 10, None, None, bos=7)
    assert ids.shape == (5, 10)
    assert (ids.ravel() == IDS[:50]).all()
    assert len(scored(ids, first)) == 5 * 9


def test_p1_bos_scores_every_token_of_text():
    ids, first = evaluation_windows(IDS, "p1_bos", 10, None, None, bos=7)
    assert ids.shape == (5, 10)
    assert (ids[:, 0] == 7).all()
    assert scored(ids, first) == IDS[:45].tolist()
    with pytest.raises(InputError, match="tokenizer has none"):
        evaluation_windows(IDS, "p1_bos", 10, None, None, bos=None)


def test_p2_scores_every_token_once():
    ids, first = evaluation_windows(IDS, "p2", 10, 4, None, bos=None)
    assert scored(ids, first) == IDS[1:].tolist()
    assert (ids[0] != PAD).all()
    assert ids.shape[1] == 10
    assert first[1:-1].tolist() == [6] * (len(first) - 2)


def test_only_the_first_windows():
    assert len(evaluation_windows(IDS, "p1", 10, None, 3, bos=None)[0]) == 3


def test_calibration_windows_are_drawn_by_seed():
    a, b, c = (calibration_windows(IDS, 3, 10, seed) for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()
    assert len({tuple(row) for row in a}) == 3
    assert all((row[0] - 100) % 10 == 0 for row in a)


def test_short_texts_are_refused():
    with pytest.raises(InputError, match=r"53 tokens: 5 windows of 10, but 6"):
        calibration_windows(IDS, 6, 10, 0)
    with pytest.raises(InputError, match=r"5 windows of 10, but 6"):
        evaluation_windows(IDS, "p1", 10, None, 6, bos=None)
    with pytest.raises(InputError, match="model's 8 positions"):
        check_length(10, 8)


def test_protocols_are_versioned():
    assert all(p.version >= 1 and p.rule for p in PROTOCOLS.values())
