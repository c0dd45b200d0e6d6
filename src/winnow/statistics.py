"""Statistics of the inputs of every matrix, from one forward pass over the calibration windows.

State is kept as empty -> accumulate -> merge; merging parts is exact up to rounding, so windows may be split over jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.architectures import Matrix, tokens_of
from winnow.products import gram_of
from winnow.progress import every
from winnow.resume import Resume

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class Moments:
    """Sums over tokens (not sequences) of the inputs x (n,) of one site, float64; what a batch adds is made in `precision`."""

    precision: torch.dtype
    count: Tensor  # (): tokens
    gram: Tensor  # (n, n): sum x x^T
    total: Tensor  # (n,): sum x
    total_abs: Tensor  # (n,): sum |x|
    largest: Tensor  # (n,): max |x|
    active: Tensor  # (n,): how often x > 0
    cross: Tensor  # (n, d): sum x z^T with z the FFN's input, for its hidden units; (n, 0) elsewhere

    @classmethod
    def empty(cls, width: int, precision: torch.dtype, device: str = "cpu", other: int = 0) -> Moments:
        gram, cross = (torch.zeros(width, n, dtype=torch.float64, device=device) for n in (width, other))
        total, total_abs, largest, active = torch.zeros(4, width, dtype=torch.float64, device=device).unbind()
        return cls(precision, torch.tensor(0), gram, total, total_abs, largest, active, cross)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; adding tokens changes these very tensors."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "precision"}

    def accumulate(self, x: Tensor, other: Tensor | None = None) -> None:
        """Add inputs x (tokens, n), and their products with `other` (tokens, d)."""
        x = x.detach()
        if not len(x):
            return
        if other is not None:
            self.cross += gram_of(x, other.detach(), self.precision)
        self.count += len(x)
        self.gram += gram_of(x, dtype=self.precision)
        x = x.to(self.precision)
        self.total += x.sum(0)
        own = x.abs()
        self.total_abs += own.sum(0)
        torch.maximum(self.largest, own.amax(0).to(self.largest.dtype), out=self.largest)
        self.active += torch.gt(x, 0, out=own).sum(0)  # as numbers: sums of bools are many times slower

    def merge(self, other: Moments) -> Moments:
        return Moments(
            self.precision,
            self.count + other.count,
            self.gram + other.gram,
            self.total + other.total,
            self.total_abs + other.total_abs,
            torch.maximum(self.largest, other.largest),
            self.active + other.active,
            self.cross + other.cross,
        )

    def finish(self) -> dict[str, Tensor]:
        """Per-token means in `precision`: gram (second moment), mean, mean_abs, rms, max_abs, active, and cross where
        there is one; and count (int64)."""
        n = self.count.clamp(min=1)  # an expert may have seen none: all are 0 then
        gram = self.gram / n
        means = {
            "gram": (gram + gram.T) / 2,
            "mean": self.total / n,
            "mean_abs": self.total_abs / n,
            "rms": gram.diagonal().sqrt(),
            "max_abs": self.largest,
            "active": self.active / n,
            **({"cross": self.cross / n} if self.cross.numel() else {}),
        }
        return {**{k: v.to(self.precision).cpu() for k, v in means.items()}, "count": self.count}


def counted_of(x: Tensor, counted: Tensor) -> Tensor:
    """The tokens (t, n) of x (windows, length, n) that are counted; no copy if all are."""
    return x.flatten(0, 1) if bool(counted.all()) else x[counted]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    matrices: list[Matrix],
    windows: Tensor,
    batch: int,
    precision: torch.dtype,
    first_token: bool = True,
    resume: Resume | None = None,
    types: Tensor | None = None,
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield (layer, {site: statistics}) after one pass of `windows` (count, length) through the model.

    Windows may be padded behind with ids below 0, which are neither attended to nor counted; `types` (count, length) tell the
    texts of a pair apart. Without `first_token`, the first token of every window is run but not counted. With `resume`, goes on
    after the last window whose sums were saved. Raises FloatingPointError with the layer's and site's name if an input is not
    finite.
    """
    device = next(model.parameters()).device
    length, skipped = windows.shape[1], 0 if first_token else 1
    real = windows >= 0
    counted = real.clone()
    counted[:, :skipped] = False
    batches: dict[str, Tensor] = {}  # `counted` of the batch that runs
    sites: dict[tuple[int, str], Moments] = {}
    inputs: dict[int, Tensor] = {}  # of the FFN that runs, by layer
    hooks = []

    def watch(matrix: Matrix):
        layer, site = matrix.layer, matrix.site
        expert: Any = None if matrix.expert is None else model.get_submodule(matrix.module.rpartition(".")[0])

        def hook(_module, args):
            if expert is None:
                x = counted_of(tokens_of(args[0], length), batches["counted"])
            else:  # gets some tokens of the batch, and knows which
                x = args[0][batches["counted"].flatten()[expert.tokens]]
            if site.endswith("ffn_input"):
                inputs[layer] = x
            sites[layer, site].accumulate(x, inputs.pop(layer) if site.endswith("ffn_hidden") else None)

        return hook

    for matrix in matrices:
        key = (matrix.layer, matrix.site)
        if key not in sites:
            hidden = matrix.site.endswith("ffn_hidden")
            width = next(m.shape[1] for m in matrices if m.site == matrix.beside("ffn_input")) if hidden else 0
            sites[key] = Moments.empty(matrix.shape[1], precision, str(device), width)
            hooks.append(model.get_submodule(matrix.module).register_forward_pre_hook(watch(matrix)))
    sums = {f"{layer}.{site}.{name}": t for (layer, site), m in sites.items() for name, t in m.tensors().items()}
    try:
        done = resume.restore(sums) if resume else 0
        for start in every(range(done, len(windows), batch), "calibration batches"):
            chosen = slice(start, start + batch)
            batches["counted"] = counted[chosen].to(device)
            given = {"input_ids": windows[chosen].clamp(min=0).to(device).long()}
            if not real[chosen].all():
                given["attention_mask"] = real[chosen].to(device).long()
            if types is not None:
                given["token_type_ids"] = types[chosen].to(device).long()
            model.base_model(**given, use_cache=False)
            if resume:
                resume.save(start + batch, sums)
    finally:
        for hook in hooks:
            hook.remove()
    expected = int(counted.sum())
    for layer in sorted({layer for layer, _ in sites}):
        finished = {}
        for (where, site), moments in sites.items():
            if where != layer:
                continue
            if int(moments.count) != expected and not site.startswith("expert"):
                raise RuntimeError(f"layer {layer}, {site}: saw {int(moments.count)} tokens of {expected}")
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
