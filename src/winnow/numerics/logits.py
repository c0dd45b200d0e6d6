"""How many logits to convert to float64 at a time: there can be hundreds of thousands for every token. PyTorch is not imported,
since forecasts need these numbers too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of a tensor. On a CPU, as many as a core's cache holds several copies of: passes over more take up to four times as
# long. On a GPU more, since every pass is a call.
ON_CPU, ON_GPU = 1 << 18, 1 << 22


def tokens_at_once(logits: Tensor) -> int:
    """The number of tokens of logits (tokens, vocabulary) to convert at a time."""
    return max(1, (ON_CPU if logits.device.type == "cpu" else ON_GPU) // logits.shape[-1])
