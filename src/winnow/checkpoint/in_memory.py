"""Compressed modules in a model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from winnow.checkpoint.layouts import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put(model: PreTrainedModel, stored: dict[str, dict[str, Tensor]], layouts: dict[str, dict[str, Any]]) -> None:
    """Replace modules of a model in memory by those of `layouts`, with the tensors of a checkpoint. Shared tensors are stored
    once there, and are one tensor here too."""
    first = next(model.parameters())
    device, dtype = first.device, first.dtype
    install(model, layouts)
    held = {  # contiguous, as read from a file: products of other strides are rounded in another order
        f"{name}.{key}": (t.to(device, dtype) if t.is_floating_point() else t.to(device)).contiguous()
        for name, tensors in stored.items()
        for key, t in tensors.items()
    }
    held |= {own: held[kept] for own, kept in model.all_tied_weights_keys.items() if kept in held}  # type: ignore[operator]
    for name in stored:
        own = {key.removeprefix(f"{name}."): t for key, t in held.items() if key.startswith(f"{name}.")}
        model.get_submodule(name).load_state_dict(own, assign=True)
