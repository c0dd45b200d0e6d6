"""Per-cluster column SVD: three numbers that contradict the paper most."""

import numpy as np
import torch

from tests.workflow.traces import Trace, apart, energies, role, tensors


def bins(columns: np.ndarray) -> list[np.ndarray]:
    """Four equal bins of columns, the largest norms first."""
    return np.array_split(np.argsort(-np.linalg.norm(columns, axis=0), kind="stable"), 4)


def noise(trace: Trace) -> tuple[float, float]:
    """What the paper's rule gains on matrices without structure, in %: nothing is to be expected. The measurement stands in the
    trace; it draws its matrices of 576 x 1,536 from seed 0."""
    assert trace.made_by("measure_study") in trace.parents[trace.top]
    draw = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(1536, 576, generator=draw, dtype=torch.float64).numpy() for _ in range(3))
    parts = bins(gate)
    one, many = [], []
    for columns, rank in ((gate, 144), (up, 144), (down, 384)):
        cut = parts if columns is not down else bins(gate)
        pieces = [columns[:, part] if columns is not down else columns.T[part] for part in cut]
        one.append(energies(columns)[rank:].sum() / np.sum(columns**2))
        many.append(sum(energies(piece)[96:].sum() for piece in pieces) / np.sum(columns**2))
    return 100 * (1 - np.sqrt(many).mean() / np.sqrt(one).mean()), 0.0


def equal_bytes(trace: Trace) -> tuple[float, float]:
    """What four clusters by norm gain over one SVD that stores as many numbers, in %: claimed are 22.6."""
    weights, found = tensors(trace.model), []
    layers = len(role(weights, "down_proj"))
    for weight in (w for name in ("gate_proj", "up_proj", "down_proj") for w in role(weights, name)[:: max(1, -(-layers // 8))]):
        (m, n), whole = weight.shape, np.sum(weight**2)
        k, stored, lost = max(1, int(0.25 * min(m, n))), n, 0.0  # an index a column
        for part in bins(weight):
            rank = min(-(-k * len(part) // n), m, len(part))
            factors, dense = rank * (m + len(part)), m * len(part)
            stored += min(factors, dense)
            lost += energies(weight[:, part])[rank:].sum() if factors < dense else 0.0
        tail, size = energies(weight), stored / (m + n)
        left = tail[int(size) :].sum() - (size - int(size)) * tail[int(size)]
        found.append(100 * (1 - np.sqrt(lost / whole) / np.sqrt(left / whole)))
    return np.mean(found), np.std(found, ddof=1) / np.sqrt(len(found))


def tiers_of_down(trace: Trace) -> tuple[float, float]:
    """Loss of tiers by weight norm above tiers by activation on down alone: claimed are 3.123 nats."""
    return apart(trace, ("tiers_weight_norm", "down-rank-0.5"), ("tiers_activation", "down-rank-0.5"))


ROWS = {"clusters_gain_noise": noise, "clusters_gain_equal_bytes": equal_bytes, "clusters_down": tiers_of_down}
