"""Compressed modules in a model that is loaded already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from winnow.layouts import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put(model: PreTrainedModel, stored: dict[str, dict[str, Tensor]], layouts: dict[str, dict[str, Any]]) -> None:
    """Replace modules of a model in memory by those of `layouts`, with the tensors that a checkpoint would hold."""
    first = next(model.parameters())
    device, dtype = first.device, first.dtype
    install(model, layouts)
    for name, tensors in stored.items():
        cast = {key: t.to(device, dtype) if t.is_floating_point() else t.to(device) for key, t in tensors.items()}
        model.get_submodule(name).load_state_dict(cast, assign=True)
