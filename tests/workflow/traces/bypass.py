"""FFN SVD with residual bypass: three numbers that contradict the paper most."""

import numpy as np

from tests.workflow.traces import Trace, energies, numbers, quotient, role, tensors


def recovery(trace: Trace) -> tuple[float, float]:
    """How much of the loss the bypass takes away at equal bytes, in %: claimed are 85."""
    dense, _ = trace.windows("dense", "dense")
    (with_it, _), (without, _) = trace.windows("both_bypass", "both-0.62"), trace.windows("grc", "both-0.62")
    left, error = quotient(with_it - dense, without - dense)
    return 100 * (1 - left), 100 * error


def rank_ratio(trace: Trace) -> tuple[float, float]:
    """Directions that hold 95 % of the squares, of down above those of gate and up, in %: claimed are -67."""

    def share(weight: np.ndarray) -> float:
        held = energies(weight).cumsum()
        return (np.sum(held < 0.95 * held[-1] * (1 - 1e-12)) + 1) / min(weight.shape)

    weights = tensors(trace.model)
    down, gate, up = ([share(w) for w in role(weights, name)] for name in ("down_proj", "gate_proj", "up_proj"))
    return 100 * (np.mean(down) / np.mean(gate + up) - 1), 0.0


def cost_ratio(trace: Trace) -> tuple[float, float]:
    """Loss per number saved, of down above that of gate and up, in %: claimed are -67."""
    dense, _ = trace.windows("dense", "dense")
    cells = [("svd", "down-rank-0.375"), ("svd", "gate-up-rank-0.375")]
    (down, _), (others, _) = (trace.windows(*cell) for cell in cells)
    saved = [numbers(trace.model) - numbers(trace.checkpoint(*cell)) for cell in cells]
    value, error = quotient(down - dense, others - dense)
    return 100 * (value * saved[1] / saved[0] - 1), 100 * error * saved[1] / saved[0]


ROWS = {"bypass_recovery": recovery, "bypass_rank_ratio_weights": rank_ratio, "bypass_cost_ratio_weights": cost_ratio}
