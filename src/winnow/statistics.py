"""Statistics of the inputs of every matrix, from one forward pass over the calibration windows.

State is kept as empty -> accumulate -> merge; merging parts is exact up to rounding, so windows may be split over jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.architectures import Matrix
from winnow.progress import every

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class Moments:
    """Sums over tokens (not sequences) of the inputs x (n,) of one site, float64; products are made in `precision`."""

    precision: torch.dtype
    count: int
    gram: Tensor  # (n, n): sum x x^T
    total: Tensor  # (n,): sum x
    total_abs: Tensor  # (n,): sum |x|
    largest: Tensor  # (n,): max |x|
    active: Tensor  # (n,): how often x > 0

    @classmethod
    def empty(cls, width: int, precision: torch.dtype, device: str = "cpu") -> Moments:
        zeros = torch.zeros(5, width, dtype=torch.float64, device=device)
        return cls(precision, 0, torch.zeros(width, width, dtype=torch.float64, device=device), *zeros[:4].clone().unbind())

    def accumulate(self, x: Tensor) -> None:
        """Add inputs x (..., n)."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.precision)
        self.count += len(x)
        self.gram += x.T @ x
        self.total += x.sum(0, dtype=torch.float64)
        self.total_abs += x.abs().sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, x.abs().amax(0).double())
        self.active += (x > 0).sum(0, dtype=torch.float64)

    def merge(self, other: Moments) -> Moments:
        return Moments(
            self.precision,
            self.count + other.count,
            self.gram + other.gram,
            self.total + other.total,
            self.total_abs + other.total_abs,
            torch.maximum(self.largest, other.largest),
            self.active + other.active,
        )

    def finish(self) -> dict[str, Tensor]:
        """Per-token means in `precision`: gram (second moment), mean, mean_abs, rms, max_abs, active; and count (int64)."""
        n = self.count
        gram = self.gram / n
        means = {
            "gram": (gram + gram.T) / 2,
            "mean": self.total / n,
            "mean_abs": self.total_abs / n,
            "rms": gram.diagonal().sqrt(),
            "max_abs": self.largest,
            "active": self.active / n,
        }
        return {**{k: v.to(self.precision).cpu() for k, v in means.items()}, "count": torch.tensor(n)}


@torch.no_grad()
def collect(
    model: PreTrainedModel, matrices: list[Matrix], windows: Tensor, batch: int, precision: torch.dtype
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield (layer, {site: statistics}) after one pass of `windows` (count, length) through the model.

    Raises FloatingPointError with the layer's and site's name if an input is not finite.
    """
    device = next(model.parameters()).device
    sites: dict[tuple[int, str], Moments] = {}
    hooks = []

    def watch(key: tuple[int, str]):
        def hook(_module, args):
            sites[key].accumulate(args[0])

        return hook

    for matrix in matrices:
        key = (matrix.layer, matrix.site)
        if key not in sites:
            sites[key] = Moments.empty(matrix.shape[1], precision, str(device))
            hooks.append(model.get_submodule(matrix.module).register_forward_pre_hook(watch(key)))
    try:
        for start in every(range(0, len(windows), batch), "calibration batches"):
            model.base_model(input_ids=windows[start : start + batch].to(device).long(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    expected = windows.numel()
    for layer in sorted({layer for layer, _ in sites}):
        finished = {}
        for (where, site), moments in sites.items():
            if where != layer:
                continue
            if moments.count != expected:
                raise RuntimeError(f"layer {layer}, {site}: saw {moments.count} tokens of {expected}")
            if not torch.isfinite(moments.gram).all():
                raise FloatingPointError(f"layer {layer}, {site}: inputs are not finite")
            finished[site] = moments.finish()
        yield layer, finished


def channel_rows(layer: int, site: str, values: dict[str, Tensor], readers: list[Tensor]) -> dict[str, Any]:
    """Columns of channels.parquet for one site: a row per channel; `weight_norm` is the norm of the columns (of all
    matrices that read the site) that multiply the channel."""
    width = len(values["mean"])
    norms = torch.cat(readers).square().sum(0).sqrt()
    return {
        "layer": [layer] * width,
        "site": [site] * width,
        "channel": list(range(width)),
        "count": [int(values["count"])] * width,
        **{key: values[key].tolist() for key in ("mean", "mean_abs", "rms", "max_abs", "active")},
        "weight_norm": norms.tolist(),
    }
