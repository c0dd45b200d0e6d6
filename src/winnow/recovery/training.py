"""The training loop of recoveries: Adam with early stopping, keeping the best state on held-out windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NotRequired

import torch
from torch import Tensor, nn

from winnow.io.records import LearnedRecord

if TYPE_CHECKING:
    from winnow.recovery.base import Trained

log = logging.getLogger(__name__)
CODES = (".trained.place", ".trained.origin")  # ends of the names of codes and zero points, see `winnow.recovery.rounded`


class Report(LearnedRecord):
    """Of training, for recovery.json."""

    steps: int
    held_out: dict[str, float]  # by step
    held_out_merged: NotRequired[float]  # with LoRA merged into rounded weights


@dataclass
class Progress:
    """Progress of training: held-out losses by step (step 0 is the initial state), and the best state so far."""

    losses: dict[int, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best_step(self) -> int:
        """The step with the lowest held-out loss; the first of equal ones, so that nothing changes without improvement."""
        return min(self.losses, key=lambda step: (self.losses[step], step))

    def report(self) -> Report:
        best = self.best_step
        return {
            "held_out_start": self.losses[0],
            "held_out_best": self.losses[best],
            "best_step": best,
            "steps": max(self.losses),
            "held_out": {str(step): loss for step, loss in self.losses.items()},
        }


def share_of_peak(step: int, options: Trained) -> float:
    """The learning rate of a step (from 0) as a share of the peak rate: linear warm-up, then cosine decay to 0."""
    warm = options.warmup * options.steps
    if step < warm:
        return (step + 1) / (math.floor(warm) + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, options.steps - warm)))


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The windows of every step: a new order of all `count` in every epoch, without an incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    while len(found) < steps:
        order = torch.randperm(count, generator=generator).tolist()
        found += [sorted(order[start : start + size]) for start in range(0, count - size + 1, size)]
    return found[:steps]


class Saver:
    """Interface for saving and resuming training; this one saves nothing."""

    def restore(self, optimizer: torch.optim.Adam, progress: Progress) -> int:
        """Restore the saved state; returns the number of completed steps."""
        return 0

    def save(self, done: int, optimizer: torch.optim.Adam, progress: Progress) -> None:
        """Save the state after `done` steps."""


def train(
    where: str,
    parameters: dict[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    held_out: Callable[[], float],
    options: Trained,
    dtypes: dict[str, torch.dtype],
    saver: Saver | None = None,
    height: Callable[[float], float] = lambda _start: 1.0,
) -> Progress:
    """Train `parameters` with `loss` (of a step), and leave them in the best state by `held_out`, which may be the initial one.
    `height`: the share of `options.rate` to use, as a function of the initial held-out loss.

    Every evaluated state is first rounded to its stored dtypes. Training stops after `options.steps`, after `options.patience`
    evaluations without improvement, or at a loss of 0. Raises FloatingPointError, naming the parameter, if a gradient is not
    finite."""
    saver = saver or Saver()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}  # others, and codes of rounded matrices
    for name, parameter in parameters.items():
        groups[name.endswith(CODES)].append(parameter)
    optimizer = torch.optim.Adam([{"params": group} for group in groups.values() if group], betas=(0.9, 0.95))
    progress = Progress()
    done = saver.restore(optimizer, progress)
    if not progress.losses:
        _look(where, 0, parameters, held_out, dtypes, progress)
    rate = options.rate * height(progress.losses[0])  # type: ignore[attr-defined]
    peaks = [options.code_rate if codes else rate for codes, group in groups.items() if group]
    for step in range(done, options.steps):
        if _finished(progress, options.patience):  # type: ignore[attr-defined]
            break
        with torch.enable_grad():
            loss(step).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise FloatingPointError(f"{where}: the gradient of {name} is not finite at step {step + 1}; lower `rate`")
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share_of_peak(step, options)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            _look(where, step + 1, parameters, held_out, dtypes, progress)
        saver.save(step + 1, optimizer, progress)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(progress.best[name])
            parameter.requires_grad_(False)
    return progress


@torch.no_grad()
def _look(
    where: str,
    step: int,
    parameters: dict[str, nn.Parameter],
    held_out: Callable[[], float],
    dtypes: dict[str, torch.dtype],
    progress: Progress,
) -> None:
    """The held-out loss of the parameters rounded to their stored dtypes; the best state is kept."""
    exact = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(exact[name].to(dtypes.get(name, parameter.dtype)))
    value = held_out()
    if not math.isfinite(value):
        raise FloatingPointError(f"{where}: the loss on held-out windows is not finite at step {step}; lower `rate`")
    progress.losses[step] = value
    if progress.best_step == step:
        progress.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(exact[name])
    log.info("%s: step %d, held-out loss %.6g%s", where, step, value, " (best)" if progress.best_step == step else "")


def _finished(progress: Progress, patience: int | None) -> bool:
    best = progress.best_step
    since = sum(step > best for step in progress.losses)
    return progress.losses[best] == 0 or (patience is not None and since >= patience)
