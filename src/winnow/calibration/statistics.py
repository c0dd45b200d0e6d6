"""Statistics of the inputs of every matrix, from one forward pass over the calibration windows.

The sums support empty -> accumulate -> merge; merging is exact up to rounding, so windows may be split over jobs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.calibration.threads import Lanes
from winnow.io.progress import every
from winnow.io.resume import Resume
from winnow.models.architectures import Matrix, tokens_of
from winnow.numerics.host import on_host
from winnow.numerics.products import PARTED, PIECE, add_product, mean_of, one_thread_of_blas

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from winnow.checkpoint.streaming import Streamed

log = logging.getLogger(__name__)
ROWS = 256  # rows of a matrix whose squares are summed at a time
TOGETHER = 8  # batches in memory whose parts are distributed together, since threads wait for each other at the end
TOKENS = 2048  # tokens per thread, for models with small products; fixed, so that sums do not depend on the number of threads
Turn = Callable[[str], AbstractContextManager[Any]]
CHANNELS = ("mean", "mean_abs", "rms", "max_abs", "active")  # statistics with one number per channel


@dataclass
class Moments:
    """Sums over tokens (not sequences) of the inputs x (n,) of one site, float64; products of a batch are in `precision`."""

    precision: torch.dtype
    count: Tensor  # (): tokens
    gram: Tensor  # (n, n): sum x x^T; only the lower triangle is always filled in
    sums: Tensor  # (3, n): sum x, sum |x|, and how often x > 0
    largest: Tensor  # (n,): max |x|
    cross: Tensor  # (n, d): sum x z^T with z the FFN's input, for its hidden units; (n, 0) elsewhere

    @classmethod
    def empty(cls, width: int, precision: torch.dtype, device: str = "cpu", other: int = 0) -> Moments:
        gram, cross = (torch.zeros(width, n, dtype=torch.float64, device=device) for n in (width, other))
        sums, largest = torch.zeros(4, width, dtype=torch.float64, device=device).split([3, 1])
        return cls(precision, torch.tensor(0), gram, sums, largest[0], cross)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; they are updated in place."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "precision"}

    def accumulate(self, x: Tensor, other: Tensor | None = None, turn: Turn = nullcontext) -> None:
        """Add inputs x (tokens, n), and their products with `other` (tokens, d); each sum is added within its `turn`."""
        x = x.detach()
        if not len(x):
            return
        if other is not None:
            add_product(self.cross, x, other.detach(), self.precision, partial(turn, "cross"))
        add_product(self.gram, x, x, self.precision, partial(turn, "gram"))
        rows = max(1, PIECE // x.shape[1]) if x.device.type == "cpu" else len(x)
        found = [_channels(some.to(self.precision)) for some in x.split(rows)]
        with turn("channels"):
            self.count += len(x)
            for sums, largest in found:
                self.sums += sums
                torch.maximum(self.largest, largest, out=self.largest)

    def merge(self, other: Moments) -> Moments:
        """Add the sums of other tokens, in place."""
        for name in ("count", "gram", "sums", "cross"):
            getattr(self, name).add_(getattr(other, name))
        torch.maximum(self.largest, other.largest, out=self.largest)
        return self

    def summed(self) -> dict[str, Tensor]:
        """The sums for another job that adds them up: products in `precision`, as the means are stored."""
        return {name: on_host(t.to(self.precision) if t.dim() == 2 else t) for name, t in self.tensors().items()}

    def finish(self) -> dict[str, Tensor]:
        """Per-token means in `precision`: gram (second moment), mean, mean_abs, rms, max_abs, active, and cross if there is one;
        and count (int64)."""
        n = self.count.clamp(min=1)  # an expert may have seen no tokens: all sums are 0 then
        gram = mean_of(self.gram, n, self.precision)
        mean, mean_abs, active = self.sums / n
        means = {
            "gram": gram,
            "mean": mean,
            "mean_abs": mean_abs,
            "rms": (self.gram.diagonal() / n).sqrt(),
            "max_abs": self.largest,
            "active": active,
            **({"cross": self.cross / n} if self.cross.numel() else {}),
        }
        return {**{k: on_host(v.to(self.precision)) for k, v in means.items()}, "count": self.count}


def counted_of(x: Tensor, counted: Tensor) -> Tensor:
    """The counted tokens (t, n) of x (windows, length, n); not a copy if all are counted."""
    return x.flatten(0, 1) if bool(counted.all()) else x[counted]


def _channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """(sums of x, |x| and x > 0 (3, n), largest |x| (n,)) of x (tokens, n), in float64."""
    total, own = x.sum(0), x.abs()
    total_abs, largest = own.sum(0), own.amax(0)
    active = torch.gt(x, 0, out=own).sum(0)  # as numbers: sums of bools are many times slower
    return torch.stack([total, total_abs, active]), largest.double()


class Seen(Exception):
    """Raised when all sites have been seen: the rest of the forward pass is not needed."""


class Watch:
    """Forward hooks that sum the inputs of matrices: {(layer, site): sums} in `sites`.

    A thread that runs the model calls `counts` to set which tokens are counted. With `ends`, the hook of the last site raises
    `Seen`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matrices: list[Matrix],
        precision: torch.dtype,
        device: str,
        lanes: int = 1,
        ends: bool = False,
    ):
        self.model, self.ends = model, ends
        self.own = threading.local()  # counted tokens; inputs of the current FFN by layer; number of remaining sites
        self.sites: dict[tuple[int, str], Moments] = {}
        self.hooks = []
        self.lanes = Lanes(lanes)
        for matrix in matrices:
            key = (matrix.layer, matrix.site)
            if key not in self.sites:
                hidden = matrix.site.endswith("ffn_hidden")
                width = next(m.shape[1] for m in matrices if m.site == matrix.beside("ffn_input")) if hidden else 0
                self.sites[key] = Moments.empty(matrix.shape[1], precision, device, width)
                self.hooks.append(model.get_submodule(matrix.module).register_forward_pre_hook(self._hook(matrix)))

    def counts(self, counted: Tensor) -> None:
        """`counted` (windows, length): mask of the counted tokens of the windows that this thread runs next."""
        self.own.counted, self.own.inputs, self.own.left = counted, {}, len(self.hooks)

    def _hook(self, matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        layer, site = matrix.layer, matrix.site
        expert: Any = None if matrix.expert is None else self.model.get_submodule(matrix.module.rpartition(".")[0])

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counted, inputs = self.own.counted, self.own.inputs
            if expert is None:
                x = counted_of(tokens_of(args[0], counted.shape[1]), counted)
            else:  # an expert: receives some tokens of the batch, and stores which
                x = args[0][counted.flatten()[expert.tokens]]
            if site.endswith("ffn_input"):
                inputs[layer] = x
            other = inputs.pop(layer) if site.endswith("ffn_hidden") else None
            self.sites[layer, site].accumulate(x, other, lambda name: self.lanes.turn((layer, site, name)))
            self.own.left -= 1
            if self.ends and not self.own.left:
                raise Seen

        return hook

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def finished(self, layer: int, expected: int, sums: bool = False) -> dict[str, dict[str, Tensor]]:
        """{site: statistics} of a layer, or its `sums`, which are freed here. Raises RuntimeError if a site, other than an
        expert's, has not seen the `expected` tokens, and FloatingPointError if an input was not finite."""
        found = {}
        for where, site in [key for key in self.sites if key[0] == layer]:
            moments = self.sites.pop((where, site))
            if int(moments.count) != expected and not site.startswith("expert"):
                raise RuntimeError(f"layer {layer}, {site}: saw {int(moments.count)} tokens of {expected}")
            if not moments.gram.sum().isfinite():  # many times faster than checking every number
                raise FloatingPointError(f"layer {layer}, {site}: inputs are not finite")
            found[site] = moments.summed() if sums else moments.finish()
        return found


class Batches:
    """Batches of windows (count, length) as model inputs; ids below 0 are padding, neither attended to nor counted."""

    def __init__(self, windows: Tensor, batch: int, first_token: bool, types: Tensor | None):
        self.windows, self.batch, self.types = windows, batch, types
        self.real = windows >= 0
        self.counted = self.real.clone()
        if not first_token:
            self.counted[:, 0] = False

    def starts(self, done: int = 0) -> range:
        return range(done, len(self.windows), self.batch)

    def parts(self, start: int, most: int) -> list[slice]:
        """The batch that begins with window `start`, in parts of at most `most` windows."""
        end = min(start + self.batch, len(self.windows))
        return [slice(begin, min(begin + most, end)) for begin in range(start, end, most)]

    def inputs(self, chosen: slice, device: str) -> dict[str, Tensor]:
        """The model inputs for the windows `chosen`."""
        given = {"input_ids": self.windows[chosen].clamp(min=0).to(device).long()}
        if not self.real[chosen].all():
            given["attention_mask"] = self.real[chosen].to(device).long()
        if self.types is not None:
            given["token_type_ids"] = self.types[chosen].to(device).long()
        return given


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
    sums: bool = False,
) -> Generator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield (layer, {site: statistics}) after one forward pass of `windows` (count, length); with `sums`, the tensors of their
    `Moments`, for `winnow.calibration.merging`.

    Windows may be padded at the end with ids below 0, which are neither attended to nor counted; `types` (count, length) are
    token type ids. Without `first_token`, the first token of every window is run but not counted. With `resume`, continues after
    the last window in the saved sums. Raises FloatingPointError, naming layer and site, if an input is not finite.
    """
    device = str(next(model.parameters()).device)
    # an expert's token indices are stored in its module, so only one thread may run it at a time
    small = device == "cpu" and all(m.shape[1] ** 2 <= PARTED and m.expert is None for m in matrices)
    part = min(max(1, batch // 2), max(1, TOKENS // windows.shape[1])) if small else batch
    watch = Watch(model, matrices, precision, device, batch // part, ends=True)
    batch *= TOGETHER if small else 1
    batches = Batches(windows, batch, first_token, types)

    @torch.no_grad()
    def run(chosen: slice) -> None:
        watch.counts(batches.counted[chosen].to(device))
        with suppress(Seen):
            model.base_model(**batches.inputs(chosen, device), use_cache=False)

    saved = {f"{layer}.{site}.{name}": t for (layer, site), m in watch.sites.items() for name, t in m.tensors().items()}
    try:
        done = resume.restore(saved) if resume else 0
        with one_thread_of_blas() if small else nullcontext():  # otherwise BLAS's threads and torch's wait for each other
            for start in every(batches.starts(done), "calibration batches"):
                watch.lanes.run([partial(run, chosen) for chosen in batches.parts(start, part)])
                if resume:
                    resume.save(start + batch, saved)
    finally:
        watch.remove()
    del saved
    for layer in sorted({layer for layer, _ in watch.sites}):
        yield layer, watch.finished(layer, int(batches.counted.sum()), sums)


@torch.no_grad()
def collect_by_block(
    streamed: Streamed,
    matrices: list[Matrix],
    windows: Tensor,
    batch: int,
    precision: torch.dtype,
    first_token: bool = True,
    types: Tensor | None = None,
    sums: bool = False,
) -> Generator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Like `collect`, with the weights and sums of only one layer in memory at a time. Layers whose hidden states an earlier
    process has stored are skipped; hidden states of a layer are stored after its statistics."""
    batches = Batches(windows, batch, first_token, types)
    for layer in streamed.remaining():
        watch = Watch(streamed.model, [m for m in matrices if m.layer == layer], precision, streamed.device)
        try:
            with streamed.block(layer):
                for start in every(batches.starts(), f"calibration batches of layer {layer}"):
                    (chosen,) = batches.parts(start, batch)
                    watch.counts(batches.counted[chosen].to(streamed.device))
                    streamed.run(start, batches.inputs(chosen, streamed.device))
        finally:
            watch.remove()
        yield layer, watch.finished(layer, int(batches.counted.sum()), sums)
        streamed.advance(layer)


def channel_rows(layer: int, site: str, values: dict[str, Tensor], readers: Iterable[Tensor]) -> dict[str, Any]:
    """Columns of channels.parquet for one site, one row per channel; `weight_norm` is the norm of the channel's columns in all
    matrices that read the site (`readers`, each W (out, in) in any dtype)."""
    width = len(values["mean"])
    squares = torch.zeros(width, dtype=torch.float64)
    for weight in readers:
        for rows in weight.split(ROWS):
            squares += rows.double().square().sum(0)
    return {
        "layer": [layer] * width,
        "site": [site] * width,
        "channel": list(range(width)),
        "count": [int(values["count"])] * width,
        **{key: values[key].tolist() for key in CHANNELS},
        "weight_norm": squares.sqrt().tolist(),
    }


def channel_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The table channels.parquet from the rows of every site."""
    import pandas as pd  # here, so that a missing pandas is reported in one line

    return pd.concat(map(pd.DataFrame, rows), ignore_index=True)
