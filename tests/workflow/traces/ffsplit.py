"""Split FFNs of heavy and light neurons: three numbers that contradict the paper most."""

import numpy as np

from tests.workflow.traces import Trace, apart, tensors

SPLIT = ("split", "ffn-0.35")


def concentrated(trace: Trace) -> tuple[float, float]:
    """The part of the squares that a quarter of the neurons holds in the least concentrated layer; the paper: nearly all."""
    held = []
    for layer in map(tensors, trace.moments()):
        squares = np.sort(layer["ffn_hidden.rms"] ** 2)[::-1]
        held.append(squares[: max(1, round(len(squares) / 4))].sum() / squares.sum())
    return min(held), 0.0


def low_rank(trace: Trace) -> tuple[float, float]:
    """Loss of the split above that of plain SVD at equal bytes: claimed is less than 0."""
    return apart(trace, SPLIT, ("svd", "ffn-0.35"))


def neuron_slice(trace: Trace) -> tuple[float, float]:
    """Loss of the split above that of an FFN of fewer neurons at equal bytes: less than 0, if light neurons are of use."""
    return apart(trace, SPLIT, ("neuron_slice", "ffn-0.35"))


ROWS = {
    "ffsplit_concentrated": concentrated,
    "ffsplit_against_low_rank": low_rank,
    "ffsplit_against_slice": neuron_slice,
}
