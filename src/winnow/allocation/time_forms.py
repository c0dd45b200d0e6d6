"""Measures how long products with the forms of matrices take, in turns with the dense matrix, from shapes alone.

A decoding step reads every matrix once and finds little of it in the caches. Calls therefore go through as many copies of a form
as the model has matrices of this shape, up to `COLD` bytes of dense ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from winnow.allocation.times import Timing, shapes_of
from winnow.errors import InputError
from winnow.evaluation.latency import bandwidth, calls_of, clock_of, interleaved, machine_record, quartiles, ratios, timed
from winnow.evaluation.machine import ENGINE
from winnow.io.progress import every
from winnow.models.architectures import Matrix
from winnow.numerics.modules import RoundedLinear
from winnow.structures.base import STRUCTURES, Structure

if TYPE_CHECKING:
    from winnow.io.records import FormTime, TimedMatrix, TimesRecord

log = logging.getLogger(__name__)
COLD = 1 << 28  # bytes of dense matrices that calls go through; more than the caches of most processors
BUSY = 1.25  # the dense matrices measured twice differ by less than this factor on a machine that does nothing else
WARM_UP = 2  # untimed calls of each form


class Turns:
    """Products with several copies of the modules of a group: every call uses the next copy."""

    def __init__(self, copies: Sequence[list[tuple[nn.Module, Tensor]]]):
        self.copies, self.next = copies, 0

    def __call__(self) -> None:
        for module, x in self.copies[self.next]:
            module(x)
        self.next = (self.next + 1) % len(self.copies)


def filled(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """The module with random numbers in place of all of its tensors, on the device; integers stay valid."""
    for tensor in module.parameters():
        nn.init.normal_(tensor, std=0.02)
    for name, buffer in module.named_buffers():
        if name.endswith("order"):
            buffer.copy_(torch.randperm(len(buffer)))
        elif not buffer.is_floating_point():
            buffer.copy_(torch.randint(0, 100, buffer.shape))
    for rounded in (one for one in module.modules() if isinstance(one, RoundedLinear)):
        rounded.scale.copy_(torch.full(rounded.scale.shape, 0.01, dtype=torch.float16).view(torch.int16))
    return module.to(device=device, dtype=dtype).eval()


def dense_module(m: Matrix) -> nn.Module:
    """An empty module like the one that the dense model has."""
    return Conv1D(*m.shape) if m.transposed else nn.Linear(m.shape[1], m.shape[0], m.bias)


def time_forms(matrices: list[Matrix], structure: Structure, timing: Timing, dtype: str, device: str) -> TimesRecord:
    """The times of all distinct shapes of matrices and of the forms that a structure (or each of its alternatives) has for them;
    `dtype` is that of the model. Raises InputError where there is no GPU and `timing` asks for one."""
    if timing.device == "cuda" != device:
        raise InputError("`time.device: cuda` of the allocation: there is no GPU here; run it where there is one, or set `cpu`")
    if timing.threads:
        torch.set_num_threads(timing.threads)
    torch.manual_seed(0)
    measure = partial(_Measure, timing, getattr(torch, timing.dtype or dtype), device)
    alone = _distinct([m] for m in matrices)
    dense = [{**_shape(group[0]), "matrices": count, **measure(group, count).dense()} for group, count in alone.values()]
    twice = max((max(d["control"]["median"], 1 / d["control"]["median"]) for d in dense), default=1.0)
    if twice > BUSY:
        log.warning("the same dense matrix took up to %.2f times as long as a moment before: the machine is busy", twice)
    forms: list[FormTime] = []
    for own in structure.alternatives().values():
        for group, count in _distinct(own.groups(matrices)).values():
            of_group = measure(group, count)
            for size in every(own.timed_sizes(group, timing.sizes), f"{own.kind()}, {'+'.join(m.role for m in group)}"):
                shapes = [_shape(m) for m in group]
                forms.append({"structure": own.kind(), "matrices": shapes, "size": size, **of_group.form(own, size)})  # type: ignore[typeddict-item]
    protocol = {**timing.model_dump(exclude={"keep"}), "dtype": timing.dtype or dtype, "warm_up": WARM_UP, "cold_bytes": COLD}
    machine = machine_record(device, "none", bandwidth(device, clock_of(device)), ENGINE)
    return {"protocol": protocol, "dense": dense, "forms": forms, "machine": machine}  # type: ignore[typeddict-item]


def _shape(m: Matrix) -> TimedMatrix:
    return {"outputs": m.shape[0], "inputs": m.shape[1], "bias": m.bias}


def _distinct(groups: Any) -> dict[tuple, tuple[list[Matrix], int]]:
    """{shapes: (a group of these shapes, how many there are)}"""
    found: dict[tuple, tuple[list[Matrix], int]] = {}
    for group in groups:
        first, count = found.get(shapes_of(group), (group, 0))
        found[shapes_of(group)] = (first, count + 1)
    return found


class _Measure:
    """What is timed of groups of one shape, of which the model has `count`."""

    def __init__(self, timing: Timing, dtype: torch.dtype, device: str, group: list[Matrix], count: int):
        self.timing, self.dtype, self.device, self.group = timing, dtype, device, group
        one = sum(math.prod(m.shape) for m in group) * dtype.itemsize
        self.copies = min(count, max(1, -(-COLD // one)))
        self.clock = clock_of(device)

    def dense(self) -> dict[str, Any]:
        """Seconds of the dense matrices, and of the same measured as if they were others (`control`, over dense)."""
        seconds = self._in_turns({})
        return {"seconds": quartiles(seconds["dense"]), "control": ratios(seconds["control"], seconds["dense"])}

    def form(self, structure: Structure, size: int) -> dict[str, Any]:
        """Seconds of the form of a size, over those of the dense matrices in the same repeat (`ratio`)."""
        seconds = self._in_turns({"form": partial(self._form, structure.layouts(self.group, size))})
        of = {"ratio": ratios(seconds["form"], seconds["dense"]), "control": ratios(seconds["control"], seconds["dense"])}
        log.info("%s, size %d: %.3f of dense", structure.kind(), size, of["ratio"]["median"])
        return {"seconds": quartiles(seconds["form"]), **of}

    def _form(self, layouts: dict[str, dict[str, Any]], m: Matrix) -> nn.Module:
        layout = layouts[m.module]
        return STRUCTURES[layout["kind"]].module(layout, dense_module(m))

    @torch.no_grad()
    def _in_turns(self, made: dict[str, Callable[[Matrix], nn.Module]]) -> dict[str, list[float]]:
        """{subject: seconds of every repeat}"""
        dense = self._turns(dense_module)
        subjects = {"dense": dense, "control": dense, **{name: self._turns(make) for name, make in made.items()}}
        calls = calls_of(subjects, self.clock, max(WARM_UP, self.copies))  # kernels prepare every copy when it is first used
        slots = {name: partial(self._slot, call, calls) for name, call in subjects.items()}
        return {name: values["product"] for name, values in interleaved(slots, self.timing.repeats).items()}

    def _slot(self, call: Turns, calls: int) -> dict[str, float]:
        return {"product": timed(call, self.clock, calls)}

    def _turns(self, make: Callable[[Matrix], nn.Module]) -> Turns:
        copies = []
        for _ in range(self.copies):
            modules = [filled(make(m), self.dtype, self.device) for m in self.group]
            widths = [getattr(module, "in_features", m.shape[1]) for module, m in zip(modules, self.group, strict=True)]
            inputs = [torch.randn(1, self.timing.tokens, width).to(self.device, self.dtype) for width in widths]
            copies.append(list(zip(modules, inputs, strict=True)))
        return Turns(copies)
