"""`refine`: every block in order is trained to match the dense block's output, on inputs from the refined model.

Source: block refinement of AA-SVD, arXiv 2604.02119."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from winnow.recovery.base import Given
from winnow.recovery.blocks import Calls, Passage, outputs_of
from winnow.recovery.rounded import stored_tensors, trainable
from winnow.recovery.training import Report, batches, train

log = logging.getLogger(__name__)


def refine_blocks(given: Given) -> dict[str, Any]:
    """Refine the blocks of `given.model` in place; returns {blocks: {name: held-out losses, steps}}, the losses as shares of the
    mean square of the target.

    Tensors that several blocks share are not trained, as this would change finished blocks. Resumes after the last saved block.
    Raises FloatingPointError, naming the block, if a gradient is not finite."""
    blocks = list(given.blocks.values())
    flat = {name: parameter.data for block in blocks for name, parameter in _own_parameters(given, block).items()}
    flat |= stored_tensors(given)
    numbers = torch.full((len(blocks), len(KEYS)), torch.nan, dtype=torch.float64)  # nan: nothing to train
    done = given.resume.restore({**flat, "numbers": numbers}) if given.resume else 0
    ways = [Sides(given, windows) for windows in given.split()]
    for index, block in list(enumerate(blocks))[done:]:
        with trainable(given, f"{block}."):
            if parameters := _own_parameters(given, block):
                found = _refine(given, index, parameters, ways)
                row = [found["held_out_start"], found["held_out_best"], found["best_step"], found["steps"]]
                numbers[index] = torch.tensor(row, dtype=torch.float64)
        if given.resume:
            given.resume.save(index + 1, {**flat, "numbers": numbers})
    trained = {name: row for name, row in zip(blocks, numbers, strict=True) if not row.isnan().any()}
    rows = {name: dict(zip(KEYS, row.tolist(), strict=True)) for name, row in trained.items()}
    kept = [name for name, row in rows.items() if row["best_step"] == 0]
    if kept:
        log.info("left unchanged, as the held-out loss did not improve: %s", ", ".join(kept))
    return {"loss": "squared error over mean square of the target", "blocks": rows, "left_as_they_were": kept}


KEYS = ("held_out_start", "held_out_best", "best_step", "steps")
FULL_RATE = 0.002  # held-out loss of a block from which on the full rate is used


def _own_parameters(given: Given, block: str) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters below a block that no module outside of it uses."""
    outside = {
        id(parameter)
        for name, parameter in given.model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{block}.")
    }
    return {name: p for name, p in given.parameters(f"{block}.").items() if id(p) not in outside}


class Sides:
    """Windows passed through the refined model and, if it provides the target, through the dense model."""

    def __init__(self, given: Given, windows: Tensor):
        blocks, self.dense = list(given.blocks.values()), given.dense
        self.own = Passage(given.model, blocks, windows, given.options.batch)
        self.other = Passage(given.dense, blocks, windows, given.options.batch) if given.options.objective == "anchored" else None

    def at(self, index: int) -> tuple[Calls, Tensor]:
        """(inputs of block `index`, its target output)"""
        calls = self.own.go_to(index)
        if self.other is not None:
            return calls, self.other.go_to(index + 1).hidden
        return calls, outputs_of(self.dense.get_submodule(self.own.blocks[index]), calls, self.own.batch, self.own.device)


def _refine(given: Given, index: int, parameters: dict[str, torch.nn.Parameter], ways: list[Sides]) -> Report:
    """Refine the block `index`; `ways`: of the training windows and of the held-out ones."""
    options, name = given.options, ways[0].own.blocks[index]
    block, device = given.model.get_submodule(name), ways[0].own.device
    sides = [side.at(index) for side in ways]
    skipped = 0 if given.first_token else 1
    scale = float(sides[0][1][:, skipped:].double().square().mean())
    order = batches(len(sides[0][1]), options.batch, options.steps, options.seed * 1_000_003 + index)

    def error(side: int, windows: Any) -> Tensor:
        calls, target = sides[side]
        difference = calls.run(block, windows, device) - target[windows].to(device)
        return difference[:, skipped:].square().mean() / scale

    def held_out() -> float:
        count = len(sides[1][1])
        parts = [slice(start, min(start + options.batch, count)) for start in range(0, count, options.batch)]
        return sum(float(error(1, part)) * (part.stop - part.start) for part in parts) / count

    loss = lambda step: error(0, order[step])  # noqa: E731
    return train(name, parameters, loss, held_out, options, given.dtypes, height=share_of_rate).report()


def share_of_rate(start: float) -> float:
    """The share of the learning rate for a block with the initial held-out loss `start`. A step of Adam changes every parameter
    by about the rate, whatever the gradient; the resulting error, about the square of the rate, must stay below `start`."""
    return min(1.0, math.sqrt(start / FULL_RATE))
