"""Cross-layer subspace coupling: three numbers that contradict the paper most."""

import re

import numpy as np

from tests.workflow.traces import Trace, apart, energies, numbers, role, tensors

COUPLED = ("coupled", "o-rank-0.25")


def against_svd(trace: Trace) -> tuple[float, float]:
    """Squared error of the coupled sections above that of plain SVD, in %: claimed are -37.2. The sections are those of the
    checkpoint, which come from a descent of their own (so the two agree as well as two descents do)."""
    parts, dense = tensors(trace.checkpoint(*COUPLED)), role(tensors(trace.model), "o_proj")
    k = next(part.shape[0] for name, part in parts.items() if name.endswith("o_proj.core.weight"))
    (enters,) = (part for name, part in parts.items() if re.search(r"o_proj\.input$", name))
    coupled = best = 0.0
    cores, lefts = role(parts, "o_proj.core"), role(parts, "o_proj.left")
    for weight, core, leaves in zip(dense, cores, lefts, strict=True):
        coupled += np.sum((weight - leaves @ core @ enters.T) ** 2)
        best += energies(weight)[k:].sum()
        enters = leaves  # the section that a layer writes to is the one that the next reads from
    return 100 * (coupled / best - 1), 0.0


def stored(trace: Trace) -> tuple[float, float]:
    """Numbers of the coupled form above those of two factors of the same rank, in %: claimed are 0."""
    rest = numbers(trace.model) - sum(w.size for w in role(tensors(trace.model), "o_proj"))
    coupled, plain = (numbers(trace.checkpoint(*cell)) - rest for cell in (COUPLED, ("whitened", "o-rank-0.25")))
    return 100 * (coupled / plain - 1), 0.0


def loss(trace: Trace) -> tuple[float, float]:
    """Loss of the coupled form above that of SVD-LLM at the same rank: claimed are 1.154 nats."""
    return apart(trace, COUPLED, ("whitened", "o-rank-0.25"))


ROWS = {"coupling_against_svd": against_svd, "coupling_bytes": stored, "coupling_loss": loss}
