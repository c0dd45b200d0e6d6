"""The statistics of `winnow.calibration.gradients` with the weights and sums of only one block in memory at a time.

Forward, block by block, hidden states are stored in files beside the artefact at the input of every s-th of L blocks, with s =
sqrt(L). The gradient at the output of the last block follows from the head, a few tokens at a time. Then, from the last block to
the first: run the block with a graph, take the vector-Jacobian product with the stored gradient of its output, add the second
moments, and store the gradient of its input. Inputs between two stored ones are computed again, s blocks at a time (Chen et al.,
Training deep nets with sublinear memory cost, arXiv 1604.06174): 8 instead of 6 operations per number and token, and about
2 sqrt(L) hidden states on disk instead of L. All this is done for one portion of the windows after another, as many at a time as
the disk may hold the hidden states of; between portions the sums of every layer are in a file, in the calibration's precision.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.calibration.gradients import OutputWatch, check_windows, draws, sampled
from winnow.calibration.parts import portions_of, spacing, states_at_once
from winnow.calibration.passes import GRADIENT, INPUT, SUMS, Passes, Piece
from winnow.errors import InputError
from winnow.io.progress import every
from winnow.models.architectures import Matrix
from winnow.models.classes import is_causal

if TYPE_CHECKING:
    from winnow.checkpoint.streaming import Streamed
    from winnow.io.records import Provenance

log = logging.getLogger(__name__)
LOGITS = 1 << 21  # logits at a time


def collect_gradients_by_block(
    streamed: Streamed,
    matrices: list[Matrix],
    windows: Tensor,
    batch: int,
    precision: torch.dtype,
    labels: str,
    seed: int,
    first_token: bool = True,
    provenance: Provenance | None = None,
    finished: Collection[int] = (),
    first: int = 0,
    sums: bool = False,
    bound: float = math.inf,
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Like `collect_gradients`, from the last layer to the first, with at most `bound` bytes of hidden states on disk (but at
    least those of one window). With a `provenance`, a job goes on after the last layer whose sums, or whose statistics (those of
    the `finished` layers), an earlier process has stored together with the gradient at its input. Raises InputError for a model
    whose head does not work token by token."""
    check_windows(windows)
    if labels == "text" and not is_causal(streamed.model.config):
        raise InputError(f"gradient_labels: {type(streamed.model).__name__} does not predict the text's next tokens; use `model`")
    length, layers = windows.shape[1], list(streamed.blocks)
    width = next(m.shape[1] for m in matrices if m.site.endswith("ffn_input"))
    matrices = [m for m in matrices if m.expert is None]
    window = states_at_once(len(layers)) * length * width * streamed.dtype.itemsize
    portions = portions_of(len(windows), batch, window, bound)
    if len(portions) > 1:
        log.info("%d portions of up to %d windows, for the disk", len(portions), portions[0].stop)
    passes = Passes(streamed, portions, provenance)

    def has(layer: int, number: int) -> bool:
        """Whether what is stored of a layer has a portion."""
        return layer in finished or passes.added(layer) >= number

    for number, portion in enumerate(portions):
        if all(has(layer, number) for layer in layers):
            continue
        run = _Run(streamed, passes, windows[portion], batch, number)
        last = run.reached({layer for layer in layers if has(layer, number)})
        passes.tidy(number, last, finished)
        if last is None:
            run.forward()
            run.start(labels, seed, first + portion.start)
            streamed.release()
            last = len(layers) - 1
        for index in range(last, -1, -1):
            layer, made = layers[index], [run.gradient(index - 1)] if index else []
            new = not has(layer, number)  # otherwise only its gradient is needed
            own = [m for m in matrices if m.layer == layer and new]
            run.refresh(index)
            watch = OutputWatch(streamed.model, own, precision, streamed.device, length, 0 if first_token else 1)
            try:
                for matrix in own if number else []:
                    watch.continue_from(matrix.name, passes.summed(number - 1, layer, matrix.role, precision))
                run.backward(index)
            finally:
                watch.remove()
            if new and portion is portions[-1]:
                yield layer, watch.finished(layer, portion.stop, sums)
            elif new:
                passes.add(number, layer, watch.finished(layer, portion.stop, True))
                made.append(Piece(number, SUMS, layer))
            if made:
                passes.keep(*made)
            passes.remove(run.gradient(index), run.input(index), Piece(number - 1, SUMS, layer))
    passes.clear()


class _Run:
    """The passes over all windows of a portion."""

    def __init__(self, streamed: Streamed, passes: Passes, windows: Tensor, batch: int, portion: int):
        self.streamed, self.passes, self.windows, self.batch, self.portion = streamed, passes, windows, batch, portion
        self.layers = list(streamed.blocks)
        self.spacing = spacing(len(self.layers))

    def input(self, index: int) -> Piece:
        return Piece(self.portion, INPUT, index)

    def gradient(self, index: int) -> Piece:
        return Piece(self.portion, GRADIENT, index)

    def reached(self, having: Collection[int]) -> int | None:
        """The first block of which the gradient at the output is stored while all later layers are among those `having` this
        portion; None if there is none, so that the gradients have to begin at the head."""
        stored = [index for index in range(len(self.layers)) if self.gradient(index) in self.passes.complete]
        return next((index for index in stored if set(self.layers[index + 1 :]) <= set(having)), None)

    def _given(self, start: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[start : start + self.batch].to(self.streamed.device).long()}

    def _hidden(self, index: int, start: int) -> Tensor | None:
        """The input of a block for a batch; None for the first block, which is preceded by the embeddings."""
        if not index:
            return None
        count = min(self.batch, len(self.windows) - start)
        return self.passes.read(self.input(index), start, count).to(self.streamed.device)

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Store the output of a block, which is the next one's input."""
        with self.streamed.block(self.layers[index]):
            for start in every(range(0, len(self.windows), self.batch), f"batches of layer {self.layers[index]}, forward"):
                output = self.streamed.output(self._given(start), self._hidden(index, start))
                if not torch.isfinite(output.sum()):
                    raise FloatingPointError(f"the output of {self.streamed.names[self.layers[index]]} is not finite")
                self.passes.write(self.input(index + 1), start, output)

    def forward(self) -> None:
        """Store the inputs of every s-th block, and the output of the last one."""
        count = len(self.layers)
        kept = [n for n in range(1, count + 1) if n % self.spacing == 0 or n == count]
        begin = max((n for n in kept if self.input(n) in self.passes.complete), default=0)
        for index in range(begin, count):
            self.step(index)
            if index + 1 in kept:
                self.passes.keep(self.input(index + 1))
            if index and index not in kept:
                self.passes.remove(self.input(index))

    def refresh(self, index: int) -> None:
        """Store the input of a block, and those between it and the last one that is stored, unless they are."""
        begin = index
        while begin and self.input(begin) not in self.passes.files:
            begin -= 1
        for step in range(begin, index):
            self.step(step)

    def start(self, labels: str, seed: int, first: int) -> None:
        """Store the gradient at the output of the last block, in place of that output; `first`: the number of the first window in
        the calibration."""
        count, length = self.windows.shape
        last = len(self.layers) - 1
        step = max(1, LOGITS // self.streamed.vocabulary)
        with self.streamed.passed():
            for window in every(range(count), "windows of the head"):
                ids, hidden = self.windows[window : window + 1], self.passes.read(self.input(last + 1), window, 1)
                uniform, gradient = draws(seed, first + window, length), torch.zeros_like(hidden)
                for part in (slice(begin, min(begin + step, length)) for begin in range(0, length, step)):
                    leaf = hidden[:, part].to(self.streamed.device).requires_grad_()
                    with torch.enable_grad():
                        logits = self._logits(leaf, ids[:, part])
                        targets = ids[0, 1:][part] if labels == "text" else sampled(logits.detach(), uniform[part])
                        own = logits[: len(targets)]  # the last token of a window has no label in the text
                        loss = nn.functional.cross_entropy(own, targets.to(own.device).long(), reduction="sum")
                    (gradient[:, part],) = torch.autograd.grad(loss, leaf)
                self.passes.write(self.gradient(last), window, gradient)
        self.passes.keep(self.gradient(last))
        self.passes.remove(self.input(last + 1))

    def _logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """(tokens, vocabulary)"""
        found = self.streamed.logits_of(hidden, ids)
        name = type(self.streamed.model).__name__
        if found.dim() != 3 or found.shape[:2] != ids.shape or found.shape[2] < 2:
            raise InputError(f"{name} does not predict token by token, so its gradients cannot be streamed; use `load: whole`")
        return found[0]

    def backward(self, index: int) -> None:
        """Run a block with the hooks of its matrices, and store the gradient at its input."""
        embedded = self.streamed.embeddings.register_forward_hook(_needs_gradient) if not index else None
        try:
            with self.streamed.block(self.layers[index]):
                batches = range(0, len(self.windows), self.batch)
                for start in every(batches, f"batches of layer {self.layers[index]}, backward"):
                    hidden = self._hidden(index, start)
                    if hidden is not None:
                        hidden.requires_grad_()
                    with torch.enable_grad():
                        output = self.streamed.output(self._given(start), hidden)
                    gradient = self.passes.read(self.gradient(index), start, len(output)).to(output)
                    output.backward(gradient)
                    if hidden is not None:
                        assert hidden.grad is not None
                        self.passes.write(self.gradient(index - 1), start, hidden.grad)
        finally:
            if embedded is not None:
                embedded.remove()


def _needs_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()
