"""Prepares a compressed model to be run."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from winnow.numerics.modules import RoundedLinear

Model = TypeVar("Model", bound=nn.Module)


def for_inference(model: Model) -> Model:
    """Set the model to `eval`, and keep the integers of its rounded matrices in the layout of the kernel that decodes with them,
    and only there: they take memory once. Returns the model.

    Outputs do not change, and the model can be saved as before. Prompts of more than 64 tokens take somewhat longer, since
    integers of 5 bits and more lie in two matrices. Matrices that the kernel does not have are left as they are, and so is a
    model that is not in bfloat16 on a CPU."""
    for module in model.eval().modules():
        if isinstance(module, RoundedLinear) and next(model.parameters()).dtype == torch.bfloat16:
            module.release()
    return model
