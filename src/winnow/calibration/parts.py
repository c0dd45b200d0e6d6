"""Which windows of a calibration run together: the part of a job, where several share them, and the portions that a job runs one
after another, so that their hidden states do not fill the disk."""

from __future__ import annotations

import math

MB = 1e6
LEAST = 4000 * MB  # bytes of hidden states that every job may store: a model of which these are enough needs one portion


def part_of(count: int, part: str | None) -> slice:
    """The windows of a job, of `count` in all: all, or those of its `part`, such as `2-of-4`. Parts differ by one window."""
    if part is None:
        return slice(0, count)
    number, parts = map(int, part.split("-of-"))
    return slice((number - 1) * count // parts, number * count // parts)


def spacing(blocks: int) -> int:
    """Every how many blocks the input of a block is stored until the gradients come back to it."""
    return math.ceil(math.sqrt(blocks))


def states_at_once(blocks: int) -> int:
    """Of how many places in a model of `blocks` blocks the hidden states of a portion, or their gradients, are stored at once:
    when the gradients of block `index` are computed, stored inputs before it, inputs that were computed again, and the gradients
    at its output and at its input."""
    every = spacing(blocks)
    return max((index // every + index % every + 2 for index in range(1, blocks)), default=2)


def hidden_bound(hidden_mb: int, model_bytes: int) -> float:
    """How many bytes of hidden states a job may store at once: `hidden_mb` megabytes, or where that is 0, half as many bytes as
    the model has, but at least 4 GB."""
    return hidden_mb * MB if hidden_mb else max(model_bytes / 2, LEAST)


def portions_of(count: int, batch: int, window: int, bound: float) -> list[slice]:
    """`count` windows in as few portions as `bound` bytes allow, of which a window takes `window`; each of whole batches, so that
    batches are those of a single portion, unless not even one batch fits. A portion has at least one window."""
    most = count if count * window <= bound else max(1, int(bound // window))
    unit = batch if most >= batch else 1
    units = math.ceil(count / unit)
    number = math.ceil(units / max(1, most // unit)) if most < count else 1
    size = unit * math.ceil(units / number)
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
