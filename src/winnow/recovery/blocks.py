"""Runs single blocks of a model with recorded inputs.

A block is called with exactly the arguments with which the model calls it, recorded by a hook; only its hidden states are
replaced. So the only argument name of transformers used here is `hidden_states`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.recovery.base import in_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.recovery.weights import Weights

HIDDEN = "hidden_states"


class Reached(Exception):
    """Raised when the awaited module is called; the rest of the forward pass is not needed."""


@dataclass
class Calls:
    """A block's hidden states (windows, length, d) on the CPU, and its other arguments by the number of windows in a call, on
    which alone they depend, since windows are not padded."""

    hidden: Tensor
    others: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, block: torch.nn.Module, windows: list[int] | slice, device: torch.device) -> Tensor:
        """The block's output for some of the windows (in a number for which arguments were recorded)."""
        hidden = self.hidden[windows].to(device)
        args, kwargs = self.others[len(hidden)]
        output = block(hidden, *args, **kwargs) if HIDDEN not in kwargs else block(*args, **{**kwargs, HIDDEN: hidden})
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def outputs_of(block: torch.nn.Module, calls: Calls, batch: int, device: torch.device) -> Tensor:
    """The block's output for all windows, (windows, length, d) on the CPU."""
    count = len(calls.hidden)
    return torch.cat([calls.run(block, slice(start, start + batch), device).cpu() for start in range(0, count, batch)])


class Passage:
    """Windows (n, length) passed through a model block by block: the input of a block is the output of the block before in its
    current state, so that every block runs once for all windows.

    `blocks`: names of all blocks in order; `weights`: where they are; in memory by default. Raises RuntimeError, naming the
    block, if the model calls a block with other inputs than that output, or the first one with other than `batch` windows of
    hidden states at a time."""

    def __init__(self, model: PreTrainedModel, blocks: list[str], windows: Tensor, batch: int, weights: Weights | None = None):
        self.model, self.blocks, self.batch = model, blocks, batch
        self.weights = weights or in_memory()
        self.device = self.weights.device(model)
        windows = windows.to(self.device)
        with self.weights.entry(model):
            self.others = _arguments(model, blocks, windows, batch)
            states = _states(model, blocks[0], windows, batch)
        self.index = 0
        self.calls = Calls(states, self.others[0])

    def go_to(self, index: int) -> Calls:
        """The inputs of block `index`; with the number of blocks, the output of the last one."""
        while self.index < index:
            name = self.blocks[self.index]
            with self.weights.block(self.model, name):
                given = outputs_of(self.model.get_submodule(name), self.calls, self.batch, self.device)
            self.index += 1
            self.calls = Calls(given, self.others[self.index] if self.index < len(self.blocks) else {})
        return self.calls


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(hidden states, other arguments as in `Calls`)"""
    if HIDDEN in kwargs:
        return kwargs[HIDDEN].detach(), args, dict(kwargs)
    return args[0].detach(), args[1:], dict(kwargs)


def _run(model: PreTrainedModel, windows: Tensor, last: str) -> None:
    """Run the model until a hook of the block `last` stops it. Raises RuntimeError if the block is not called."""
    try:
        model.base_model(input_ids=windows.long(), use_cache=False)
    except Reached:
        return
    raise RuntimeError(f"{last} is not called when the model runs")


@torch.no_grad()
def _states(model: PreTrainedModel, name: str, windows: Tensor, batch: int) -> Tensor:
    """The hidden states with which the first block is called, (n, length, d) on the CPU."""
    hidden: list[Tensor] = []

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(_split(args, kwargs)[0].cpu())
        raise Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for start in range(0, len(windows), batch):
            _run(model, windows[start : start + batch], name)
    finally:
        handle.remove()
    states = torch.cat(hidden)
    if states.dim() != 3 or states.shape[:2] != windows.shape:
        raise RuntimeError(f"{name} is called with {tuple(states.shape)}, not with {tuple(windows.shape)} hidden states")
    return states


@torch.no_grad()
def _arguments(model: PreTrainedModel, blocks: list[str], windows: Tensor, batch: int) -> list[dict[int, Any]]:
    """The other arguments of every block by the number of windows in a call, recorded by one run per possible number."""
    found: list[dict[int, Any]] = [{} for _ in blocks]
    last: list[Tensor] = []  # the output of the block before

    def before(index: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, *others = _split(args, kwargs)
            if index and not (last and torch.equal(hidden, last.pop())):
                raise RuntimeError(f"{blocks[index]} is not called with the output of {blocks[index - 1]}")
            found[index][len(hidden)] = tuple(others)
            if index == len(blocks) - 1:
                raise Reached

        return hook

    def after(_module: Any, _args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    modules = [model.get_submodule(name) for name in blocks]
    hooks = [module.register_forward_pre_hook(before(index), with_kwargs=True) for index, module in enumerate(modules)]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        for part in {len(part): part for part in windows.split(batch)}.values():
            _run(model, part, blocks[-1])
    finally:
        for handle in hooks:
            handle.remove()
    return found
