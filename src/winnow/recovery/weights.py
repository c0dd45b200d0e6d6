"""Where the weights are that a recovery reads and trains: in memory, or in files, from which one block at a time is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.errors import InputError
from winnow.recovery.rounded import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.checkpoint.streaming import Streamed
    from winnow.io.resume import Resume
    from winnow.recovery.base import Given


class Weights:
    """Of models that are in memory."""

    def device(self, model: PreTrainedModel) -> torch.device:
        return next(model.parameters()).device

    @contextmanager
    def block(self, model: PreTrainedModel, name: str) -> Iterator[None]:
        """Context manager in which the weights of a block are in memory, as they are after its training."""
        yield

    @contextmanager
    def entry(self, model: PreTrainedModel) -> Iterator[None]:
        """Context manager in which the model can be run to see how it calls its blocks: the inputs of the first are right, those
        of the others have the right shape."""
        yield

    def finished(self, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> None:
        """Use these tensors of a block, by this process or an earlier one, from now on."""
        copy_into(model, tensors)

    def trained(self, given: Given) -> Callable[[str], Tensor | None]:
        """name -> the tensor of `given.model` after training, or None for those that the recovery does not train."""
        ids = {id(parameter) for parameter in given.parameters().values()}
        named = given.model.named_parameters(remove_duplicate=False)
        found = {name: parameter.detach() for name, parameter in named if id(parameter) in ids}
        return (found | stored_tensors(given)).get


class ByBlock(Weights):
    """Of models whose blocks are read when they are needed; trained blocks are kept by `resume`, and read from there. Raises
    InputError where such a file is lost or damaged later."""

    def __init__(self, own: Streamed, dense: Streamed, resume: Resume):
        self.own, self.resume = own, resume
        self.streams = {id(one.model): one for one in (own, dense)}
        self.done: set[str] = set()

    def device(self, model: PreTrainedModel) -> torch.device:
        return torch.device(self.own.device)

    @contextmanager
    def block(self, model: PreTrainedModel, name: str) -> Iterator[None]:
        streamed = self.streams[id(model)]
        layer = next(layer for layer, own in streamed.names.items() if own == name)
        with streamed.loaded(layer):
            if streamed is self.own:
                copy_into(model, self._kept(name))
            yield

    @contextmanager
    def entry(self, model: PreTrainedModel) -> Iterator[None]:
        streamed = self.streams[id(model)]
        try:
            with streamed.block(next(iter(streamed.blocks))):
                yield
        finally:
            streamed.release()

    def finished(self, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> None:
        self.done.add(name)

    def _kept(self, name: str) -> dict[str, Tensor]:
        """The tensors of a block after its training; none before."""
        found = self.resume.kept(name) if name in self.done else {}
        if name in self.done and not found:
            raise InputError(f"{self.resume.path}-{name}: lost or damaged while in use; run snakemake again")
        return found

    def trained(self, given: Given) -> Callable[[str], Tensor | None]:
        held: dict[str, Any] = {"block": None}

        def of(name: str) -> Tensor | None:
            block = next((own for own in given.blocks.values() if name.startswith(f"{own}.")), None)
            if block is None:
                return None
            if held["block"] != block:
                held.update(block=block, tensors=self._kept(block))
            return held["tensors"].get(name)

        return of


@torch.no_grad()
def copy_into(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of these names; names without a dot are no part of a model, and ignored."""
    for name, value in tensors.items():
        place, _, key = name.rpartition(".")
        if place:
            getattr(model.get_submodule(place), key).copy_(value)
