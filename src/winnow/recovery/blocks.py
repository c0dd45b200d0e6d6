"""Blocks of a model by themselves: what they are called with, and what they give.

A block is called with exactly what the model calls it with, as a hook saw it; only its hidden states are put in anew. So no
argument of any version of transformers is named here but `hidden_states`, where that comes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN = "hidden_states"


class _Reached(Exception):
    """The block is reached; the rest of the model need not run."""


@dataclass
class Calls:
    """A block's hidden states (windows, length, d) on the CPU, and its other arguments by the number of windows in a call:
    windows are whole, so these depend on nothing else."""

    hidden: Tensor
    others: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, block: torch.nn.Module, windows: list[int] | slice, device: torch.device) -> Tensor:
        """What the block gives for some of the windows (a number of them that the model was run with)."""
        hidden = self.hidden[windows].to(device)
        args, kwargs = self.others[len(hidden)]
        output = block(hidden, *args, **kwargs) if HIDDEN not in kwargs else block(*args, **{**kwargs, HIDDEN: hidden})
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def calls_of(model: PreTrainedModel, name: str, windows: Tensor, batch: int) -> Calls:
    """What the block `name` is called with for windows (n, length), `batch` at a time. Raises RuntimeError if it is not called
    once with hidden states of their shape."""
    hidden: list[Tensor] = []
    others: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        by_name = HIDDEN in kwargs
        found = kwargs[HIDDEN] if by_name else args[0]
        hidden.append(found.detach().cpu())
        others.setdefault(len(found), (args if by_name else args[1:], kwargs))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        for start in range(0, len(windows), batch):
            try:
                model.base_model(input_ids=windows[start : start + batch].to(device).long(), use_cache=False)
            except _Reached:
                continue
            raise RuntimeError(f"{name} is not called when the model runs")
    finally:
        handle.remove()
    states = torch.cat(hidden)
    if states.dim() != 3 or states.shape[:2] != windows.shape:
        raise RuntimeError(f"{name} is called with {tuple(states.shape)}, not with {tuple(windows.shape)} hidden states")
    return Calls(states, others)


@torch.no_grad()
def outputs_of(block: torch.nn.Module, calls: Calls, batch: int, device: torch.device) -> Tensor:
    """(windows, length, d) on the CPU: what the block gives for all windows."""
    count = len(calls.hidden)
    return torch.cat([calls.run(block, slice(start, start + batch), device).cpu() for start in range(0, count, batch)])
