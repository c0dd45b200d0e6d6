"""The divergence of a model's predictions from the dense model's: KL(dense || model), nats per token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.errors import InputError

if TYPE_CHECKING:
    from winnow.recovery.base import Given


def predictions(given: Given, ids: Tensor, instead: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities for windows (n, length) of the model and, without gradients, of the dense model. Raises InputError for a
    model without logits; `instead` is the remedy in its message."""
    with torch.no_grad():
        reference = _logits(given.dense, ids, instead)
    return _logits(given.model, ids, instead).log_softmax(-1), reference.log_softmax(-1)


def divergence(own: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || own) from log-probabilities, as the mean over tokens."""
    return (dense.exp() * (dense - own)).sum(-1).mean()


def mean_of_windows(loss: Any, windows: Tensor, batch: int, device: torch.device) -> float:
    """The mean over all windows of `loss`, a function of a batch of windows."""
    parts = [windows[first : first + batch].to(device).long() for first in range(0, len(windows), batch)]
    return math.fsum(float(loss(part)) * len(part) for part in parts) / len(windows)


def _logits(model: Any, ids: Tensor, instead: str) -> Tensor:
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if logits is None:
        raise InputError(f"recovery: {type(model).__name__} has no logits to compare; {instead}")
    return logits.float()
