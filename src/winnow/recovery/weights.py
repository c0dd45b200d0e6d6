"""Where the weights are that a recovery reads and trains: in memory, or in files, from which one block at a time is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        """Context manager in which the model runs up to its first block, and calls all others, with any hidden states."""
        yield

    def put(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
        """Use these tensors of a block that was trained earlier."""
        copy_into(model, tensors)

    def trained(self, given: Given) -> Callable[[str], Tensor | None]:
        """name -> the tensor of `given.model` after training, or None for those that the recovery does not train."""
        ids = {id(parameter) for parameter in given.parameters().values()}
        named = given.model.named_parameters(remove_duplicate=False)
        found = {name: parameter.detach() for name, parameter in named if id(parameter) in ids}
        return (found | stored_tensors(given)).get


class ByBlock(Weights):
    """Of models whose blocks are read when they are needed; trained blocks are kept by `resume`."""

    def __init__(self, own: Streamed, dense: Streamed, resume: Resume):
        self.own, self.resume = own, resume
        self.streams = {id(one.model): one for one in (own, dense)}

    def device(self, model: PreTrainedModel) -> torch.device:
        return torch.device(self.own.device)

    @contextmanager
    def block(self, model: PreTrainedModel, name: str) -> Iterator[None]:
        streamed = self.streams[id(model)]
        layer = next(layer for layer, own in streamed.names.items() if own == name)
        with streamed.loaded(layer):
            if streamed is self.own:
                copy_into(model, self.resume.kept(name))
            yield

    @contextmanager
    def entry(self, model: PreTrainedModel) -> Iterator[None]:
        streamed = self.streams[id(model)]
        try:
            with streamed.block(next(iter(streamed.blocks))):
                yield
        finally:
            streamed.release()

    def put(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
        """`block` reads them."""

    def trained(self, given: Given) -> Callable[[str], Tensor | None]:
        held: dict[str, Any] = {"block": None}

        def of(name: str) -> Tensor | None:
            block = next((own for own in given.blocks.values() if name.startswith(f"{own}.")), None)
            if block is None:
                return None
            if held["block"] != block:
                held.update(block=block, tensors=self.resume.kept(block))
            return held["tensors"].get(name)

        return of


@torch.no_grad()
def copy_into(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of these names; other names are ignored."""
    for name, value in tensors.items():
        place, _, key = name.rpartition(".")
        if place:
            getattr(model.get_submodule(place), key).copy_(value)
