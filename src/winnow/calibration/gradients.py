"""Second moments of the gradient of the loss at the output of every matrix, from one forward and backward pass.

The loss of a window is the sum over its tokens; labels are sampled from the model (Fisher information) or are the next tokens of
the text (empirical Fisher).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.calibration.threads import Lanes
from winnow.errors import InputError
from winnow.io.progress import every
from winnow.io.resume import Resume
from winnow.models.architectures import Matrix, tokens_of
from winnow.models.classes import is_causal
from winnow.numerics.host import on_host
from winnow.numerics.logits import tokens_at_once
from winnow.numerics.products import PARTED, add_product, mean_of, one_thread_of_blas

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Turn = Callable[[str], AbstractContextManager[Any]]


@dataclass
class OutputMoments:
    """Sums of one matrix (m, n), float64; products are computed in `precision`."""

    precision: torch.dtype
    count: Tensor  # (): tokens
    gram: Tensor  # (m, m): sum over tokens of g g^T; only the lower triangle is always filled in
    fisher: Tensor  # (m,): sum over windows and columns j of (dL/dW_ij)^2

    def accumulate(self, x: Tensor, g: Tensor, turn: Turn = nullcontext) -> None:
        """Add inputs x (windows, tokens, n) and gradients g (windows, tokens, m); each sum is added within its `turn`."""
        x, g = x.to(self.precision), g.to(self.precision)
        flat = g.flatten(0, 1)
        add_product(self.gram, flat, flat, self.precision, partial(turn, "gram"))
        # sum_j (sum_t g_ti x_tj)^2 = sum_tt' g_ti (x x^T)_tt' g_t'i, without forming the gradient of the matrix
        fisher = (g * ((x @ x.mT) @ g)).sum((0, 1), dtype=torch.float64)
        with turn("fisher"):
            self.count += g.shape[0] * g.shape[1]
            self.fisher += fisher

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; they are updated in place."""
        return {"count": self.count, "gram": self.gram, "fisher": self.fisher}

    def merge(self, other: OutputMoments) -> OutputMoments:
        """Add the sums of other tokens, in place."""
        for name, own in self.tensors().items():
            own.add_(getattr(other, name))
        return self

    def summed(self) -> dict[str, Tensor]:
        """The sums for another job that adds them up: products in `precision`, as the means are stored."""
        return {name: on_host(t.to(self.precision) if t.dim() == 2 else t) for name, t in self.tensors().items()}

    def finish(self) -> dict[str, Tensor]:
        """Per-token means in `precision`: gradient_gram (m, m) and fisher (m,)."""
        gram = mean_of(self.gram, self.count, self.precision)
        fisher = self.fisher.clamp(min=0) / self.count
        return {"gradient_gram": gram.cpu(), "fisher": fisher.to(self.precision).cpu()}


class OutputWatch:
    """Forward hooks that sum the gradients at the outputs of matrices, of windows of `length` tokens: {name: sums} in `sums`.
    The first `skipped` tokens of a window are not counted."""

    def __init__(
        self,
        model: PreTrainedModel,
        matrices: list[Matrix],
        precision: torch.dtype,
        device: str,
        length: int,
        skipped: int,
        lanes: int = 1,
    ):
        self.matrices, self.length, self.skipped, self.lanes = matrices, length, skipped, Lanes(lanes)
        self.sums: dict[str, OutputMoments] = {}
        self.hooks = []
        for matrix in matrices:
            m = matrix.shape[0]
            zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((m, m), (m,))]
            self.sums[matrix.name] = OutputMoments(precision, torch.tensor(0), *zeros)
            self.hooks.append(model.get_submodule(matrix.module).register_forward_hook(self._hook(matrix)))

    def _hook(self, matrix: Matrix) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def counted(x: Tensor) -> Tensor:
            return tokens_of(x, self.length)[:, self.skipped :]

        def forward(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = counted(args[0].detach())
            output.register_hook(lambda g: self.sums[matrix.name].accumulate(x, counted(g), turn))

        def turn(name: str) -> AbstractContextManager[None]:
            return self.lanes.turn((matrix.name, name))

        return forward

    def continue_from(self, name: str, sums: OutputMoments) -> None:
        """Add to the `sums` of other windows, which were computed before, for the matrix of that name."""
        device = self.sums[name].gram.device
        self.sums[name] = replace(sums, gram=sums.gram.to(device), fisher=sums.fisher.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name; they are updated in place."""
        return {f"{name}.{key}": t for name, sums in self.sums.items() for key, t in sums.tensors().items()}

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def finished(self, layer: int, windows: int, sums: bool = False) -> dict[str, dict[str, Tensor]]:
        """{role: statistics} of a layer, or its `sums`, which are freed here. Raises RuntimeError if an output has not received
        the gradients of all `windows`, and FloatingPointError if one was not finite."""
        found, expected = {}, windows * (self.length - self.skipped)
        for matrix in (m for m in self.matrices if m.layer == layer):
            own = self.sums.pop(matrix.name)
            if (count := int(own.count)) != expected:
                raise RuntimeError(f"{matrix.module}: saw gradients of {count} tokens of {expected}")
            if not own.gram.sum().isfinite():  # many times faster than checking every number
                raise FloatingPointError(f"{matrix.module}: the gradient of its output is not finite")
            found[matrix.role] = own.summed() if sums else own.finish()
        return found


def draws(seed: int, window: int, count: int) -> Tensor:
    """(count, 1): uniform numbers that choose the labels of a window; the same for every batch size and device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + window)
    return torch.rand(count, 1, generator=generator, dtype=torch.float64)


def sampled(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per position (tokens,), sampled from logits (tokens, vocabulary) by uniform numbers (tokens, 1)."""
    found = []
    for part, numbers in zip(*(x.split(tokens_at_once(logits)) for x in (logits, uniform)), strict=True):
        below = torch.softmax(part.double(), dim=-1).cumsum(-1)
        found.append(torch.searchsorted(below, numbers.to(below.device) * below[:, -1:]).flatten())
    return torch.cat(found).clamp(max=logits.shape[-1] - 1)


def check_windows(windows: Tensor) -> None:
    """Raises InputError for rows of a task."""
    if (windows < 0).any():
        raise InputError("gradients need windows of a text, not rows of a task; use a metric without gradients")


def logits_of(model: PreTrainedModel, ids: Tensor, labels: str) -> Tensor:
    """Logits (windows, labelled positions, classes): one position per token, or per window for a classifier. Raises InputError
    for a model without logits, or with logits that the text has no labels for."""
    found = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    name = type(model).__name__
    if found is None or found.shape[-1] < 2:
        raise InputError(f"{name} has no logits, and so no loss for gradients; use a metric without gradients")
    if labels == "text" and not is_causal(model.config):
        raise InputError(f"gradient_labels: {name} does not predict the text's next tokens; use `model`")
    return found if found.dim() == 3 else found[:, None]


def loss_of(logits: Tensor, ids: Tensor, labels: str, seed: int, start: int) -> Tensor:
    """(): the loss of windows `ids` (windows, length), of which the first has the index `start`, summed over their tokens."""
    if labels == "text":
        logits, targets = logits[:, :-1], ids[:, 1:]
    else:
        with torch.no_grad():
            rows = [sampled(row, draws(seed, start + n, len(row))) for n, row in enumerate(logits)]
            targets = torch.stack(rows)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def collect_gradients(
    model: PreTrainedModel,
    matrices: list[Matrix],
    windows: Tensor,
    batch: int,
    precision: torch.dtype,
    labels: str,
    seed: int,
    first_token: bool = True,
    resume: Resume | None = None,
    first: int = 0,
    sums: bool = False,
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield (layer, {role: statistics}) after a forward and a backward pass of `windows` (count, length); with `sums`, the
    tensors of their `OutputMoments`, for `winnow.calibration.merging`. `first`: the number of their first window among those of
    the calibration, by which labels are drawn.

    `labels`: `model` (sampled with `seed`) or `text`. Experts of a mixture are skipped: their gradients come from few tokens.
    With `resume`, continues after the last window in the saved sums. Raises FloatingPointError, naming the module, if a gradient
    is not finite.
    """
    check_windows(windows)
    matrices = [m for m in matrices if m.expert is None]
    model.requires_grad_(False)
    device = next(model.parameters()).device
    embedded = model.get_input_embeddings().register_forward_hook(lambda _m, _args, output: output.requires_grad_())
    small = device.type == "cpu" and all(max(m.shape) ** 2 <= PARTED for m in matrices)
    part = max(1, batch // 2) if small else batch  # two in parallel need as much memory as one batch
    skipped = 0 if first_token else 1
    watch = OutputWatch(model, matrices, precision, str(device), windows.shape[1], skipped, batch // part)
    saved = watch.tensors()

    def run(begin: int, end: int) -> None:
        ids = windows[begin:end].to(device).long()
        with torch.enable_grad():
            loss_of(logits_of(model, ids, labels), ids, labels, seed, first + begin).backward()

    try:
        done = resume.restore(saved) if resume else 0
        with one_thread_of_blas() if small else nullcontext():  # otherwise BLAS's threads and torch's wait for each other
            for start in every(range(done, len(windows), batch), "gradient batches"):
                end = min(start + batch, len(windows))
                watch.lanes.run([partial(run, begin, min(begin + part, end)) for begin in range(start, end, part)])
                if resume:
                    resume.save(start + batch, saved)
    finally:
        embedded.remove()
        watch.remove()
    del saved
    for layer in sorted({m.layer for m in matrices}):
        yield layer, watch.finished(layer, len(windows), sums)
