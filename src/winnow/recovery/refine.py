"""`refine`: every block in order is trained to match the dense block's output, on inputs from the refined model.

Source: block refinement of AA-SVD, arXiv 2604.02119."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from winnow.errors import InputError
from winnow.recovery.base import Given
from winnow.recovery.blocks import Calls, Passage, outputs_of
from winnow.recovery.rounded import rounded_modules, stored_tensors, trainable
from winnow.recovery.training import Report, batches, train

log = logging.getLogger(__name__)
KEYS = ("held_out_start", "held_out_best", "best_step", "steps")
NUMBERS = "numbers"  # beside the tensors of a block
FULL_RATE = 0.002  # held-out loss of a block from which on the full rate is used


def refine_blocks(given: Given) -> dict[str, Any]:
    """Refine the blocks of `given.model` in place, or where its blocks are read one by one, in files of `given.resume`; returns
    {blocks: {name: held-out losses, steps}}, the losses as shares of the mean square of the target.

    Tensors that several blocks share are not trained, as this would change finished blocks. Resumes after the last finished
    block. Raises InputError for `layers` that the model does not have, FloatingPointError, naming the block, if a gradient is not
    finite."""
    blocks, shared, chosen = list(given.blocks.values()), _shared(given), _chosen(given)
    ways = [Sides(given, windows) for windows in given.split()]
    rows, resume, resuming = {}, given.resume, given.resume is not None
    for index, block in enumerate(blocks):
        if block not in chosen or not _trains(given, block, shared):
            continue
        found = resume.kept(block) if resume and resuming else {}
        if not found:
            resuming = False  # later blocks were trained behind another state of this one
            found = _refined(given, index, shared, ways)
            if resume:
                resume.keep(block, found)
        given.weights.finished(given.model, block, found)
        rows[block] = dict(zip(KEYS, found[NUMBERS].tolist(), strict=True))
    kept = [name for name, row in rows.items() if row["best_step"] == 0]
    if kept:
        log.info("left unchanged, as the held-out loss did not improve: %s", ", ".join(kept))
    return {"loss": "squared error over mean square of the target", "blocks": rows, "left_as_they_were": kept}


def _chosen(given: Given) -> list[str]:
    """The blocks to refine."""
    layers = given.options.layers
    if layers is None:
        return list(given.blocks.values())
    if missing := [layer for layer in layers if layer not in given.blocks]:
        raise InputError(f"recovery: layers {missing} of `layers` are not in the model, which has 0 to {max(given.blocks)}")
    return [given.blocks[layer] for layer in layers]


def _shared(given: Given) -> set[str]:
    """The parameters that several blocks use, or a block and a module outside of all blocks."""
    places: dict[int, set[str]] = {}
    inside = tuple(f"{block}." for block in given.blocks.values())
    named = list(given.model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        places.setdefault(id(parameter), set()).add(next((block for block in inside if name.startswith(block)), ""))
    return {name for name, parameter in named if len(places[id(parameter)]) > 1}


def _trains(given: Given, block: str, shared: set[str]) -> bool:
    """Whether anything of a block is trained."""
    return bool(set(given.parameters(f"{block}.")) - shared or rounded_modules(given, f"{block}."))


def _refined(given: Given, index: int, shared: set[str], ways: list[Sides]) -> dict[str, Tensor]:
    """Refine a block; returns its tensors by name, and NUMBERS, those of the report."""
    block = list(given.blocks.values())[index]
    sides = [side.at(index) for side in ways]
    with given.weights.block(given.model, block):
        with trainable(given, f"{block}."):
            outside = {id(p) for n, p in given.model.named_parameters(remove_duplicate=False) if not n.startswith(f"{block}.")}
            below = given.parameters(f"{block}.").items()  # with those that `trainable` added, of modules that may be shared, too
            parameters = {name: p for name, p in below if name not in shared and id(p) not in outside}
            report = _refine(given, index, parameters, sides, ways[0].own.device)
        found = {name: p.detach().clone() for name, p in parameters.items() if ".trained." not in name}
        found |= {name: tensor.clone() for name, tensor in stored_tensors(given, f"{block}.").items()}
    numbers = [report["held_out_start"], report["held_out_best"], report["best_step"], report["steps"]]
    return {**found, NUMBERS: torch.tensor(numbers, dtype=torch.float64)}


class Sides:
    """Windows passed through the refined model and, if it provides the target, through the dense model."""

    def __init__(self, given: Given, windows: Tensor):
        blocks, self.dense = list(given.blocks.values()), given.dense
        self.own = Passage(given.model, blocks, windows, given.options.batch, given.weights)
        anchored = given.options.objective == "anchored"
        self.other = Passage(given.dense, blocks, windows, given.options.batch, given.weights) if anchored else None

    def at(self, index: int) -> tuple[Calls, Tensor]:
        """(inputs of block `index`, its target output)"""
        calls = self.own.go_to(index)
        if self.other is not None:
            return calls, self.other.go_to(index + 1).hidden
        own, name = self.own, self.own.blocks[index]
        with own.weights.block(self.dense, name):
            return calls, outputs_of(self.dense.get_submodule(name), calls, own.batch, own.device)


def _refine(
    given: Given, index: int, parameters: dict[str, torch.nn.Parameter], sides: list[tuple[Calls, Tensor]], device: torch.device
) -> Report:
    """Refine the block `index`; `sides`: its inputs and its target, of the training windows and of the held-out ones."""
    options, name = given.options, list(given.blocks.values())[index]
    block = given.model.get_submodule(name)
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
