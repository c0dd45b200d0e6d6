"""The statistics of `winnow.calibration.gradients` with the weights and sums of only one block in memory at a time.

Forward, block by block, hidden states are stored in files beside the artefact at the input of every s-th of L blocks, with s =
sqrt(L). The gradient at the output of the last block follows from the head, a few tokens at a time. Then, from the last block to
the first: run the block with a graph, take the vector-Jacobian product with the stored gradient of its output, add the second
moments, and store the gradient of its input. Inputs between two stored ones are computed again, s blocks at a time (Chen et al.,
Training deep nets with sublinear memory cost, arXiv 1604.06174): 8 instead of 6 operations per number and token, and about
2 sqrt(L) hidden states of all tokens on disk instead of L.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.calibration.gradients import OutputWatch, check_windows, draws, sampled
from winnow.errors import InputError
from winnow.io.artifacts import file_digest, read_json, write_json
from winnow.io.hidden_states import HiddenStates
from winnow.io.progress import every
from winnow.models.architectures import Matrix
from winnow.models.classes import is_causal

if TYPE_CHECKING:
    from winnow.checkpoint.streaming import Streamed
    from winnow.io.records import Provenance

log = logging.getLogger(__name__)
LOGITS = 1 << 21  # logits at a time
GRADIENT = "gradient-{}"  # file of the gradient at the output of the block of that index; `input-{}` is its input


class Passes:
    """Hidden states and gradients of all windows in files beside an artefact. With a `provenance`, files that a process of the
    same provenance has completed are used again."""

    def __init__(self, streamed: Streamed, provenance: Provenance | None = None):
        self.streamed = streamed
        self.provenance = None if provenance is None else json.loads(json.dumps(provenance))
        self.complete: dict[str, str] = {}  # {name: digest of the file}
        self.files: dict[str, HiddenStates] = {}
        self.kind: tuple[int, str] | None = None  # width and dtype of hidden states
        self._restore()

    def path(self, name: str) -> Path:
        prefix = self.streamed.prefix
        return prefix.with_name(f"{prefix.name}-{name}")

    def write(self, name: str, first: int, x: Tensor) -> None:
        """Store x (windows, length, width) for the windows from `first` on."""
        if name not in self.files:
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self.kind = (x.shape[2], str(x.dtype).removeprefix("torch."))
            self.files[name] = HiddenStates(path, self.streamed.length, x.shape[2], x.dtype)
        self.files[name].write(first, x.detach())

    def read(self, name: str, first: int, count: int) -> Tensor:
        return self.files[name].read(first, count, slice(0, self.streamed.length))

    def keep(self, *names: str) -> None:
        """Keep the files `names`, which are complete, for later processes."""
        self.complete |= {name: file_digest(self.path(name)) for name in names}
        self._save()

    def remove(self, *names: str) -> None:
        if any([self.complete.pop(name, None) for name in names]):
            self._save()
        for name in names:
            self.files.pop(name, None)
            self.path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all files beside the artefact."""
        prefix = self.streamed.prefix
        for path in prefix.parent.glob(f"{prefix.name}-*"):
            path.unlink()
        self._state().unlink(missing_ok=True)

    def _state(self) -> Path:
        prefix = self.streamed.prefix
        return prefix.with_name(f"{prefix.name}.json")

    def _save(self) -> None:
        if self.provenance is not None:
            write_json(self._state(), {"complete": self.complete, "kind": self.kind, "of": self.provenance})

    def _restore(self) -> None:
        if self.provenance is None or not self._state().is_file():
            return
        try:
            state = read_json(self._state())
        except (InputError, ValueError) as error:
            log.info("starting over: %s", error)
            return
        if state["of"] != self.provenance:
            log.info("starting over: the hidden states in %s are from another job", self.streamed.prefix.parent)
            return
        width, dtype = self.kind = tuple(state["kind"])
        for name, digest in state["complete"].items():
            path = self.path(name)
            if path.is_file() and file_digest(path) == digest:
                self.complete[name] = digest
                self.files[name] = HiddenStates(path, self.streamed.length, width, getattr(torch, dtype))


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
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Like `collect_gradients`, from the last layer to the first. With a `provenance`, a job continues after the last layer of
    `finished` whose gradient an earlier process has stored. Raises InputError for a model whose head does not work token by
    token."""
    check_windows(windows)
    if labels == "text" and not is_causal(streamed.model.config):
        raise InputError(f"gradient_labels: {type(streamed.model).__name__} does not predict the text's next tokens; use `model`")
    matrices = [m for m in matrices if m.expert is None]
    layers, passes = list(streamed.blocks), Passes(streamed, provenance)
    count = len(layers)
    every_s = math.ceil(math.sqrt(count))
    last = count - 1
    while last >= 0 and layers[last] in finished and (not last or GRADIENT.format(last - 1) in passes.complete):
        last -= 1
    run = _Run(streamed, passes, windows, batch)
    if last >= 0 and GRADIENT.format(last) not in passes.complete:
        last = count - 1
        run.forward(every_s)
        run.start(labels, seed, first)
        streamed.release()
    skipped = 0 if first_token else 1
    for index in range(last, -1, -1):
        layer, own = layers[index], [m for m in matrices if m.layer == layers[index]]
        run.refresh(index, every_s)
        watch = OutputWatch(streamed.model, own, precision, streamed.device, windows.shape[1], skipped)
        try:
            run.backward(index)
        finally:
            watch.remove()
        yield layer, watch.finished(layer, len(windows), sums)
        if index:
            passes.keep(GRADIENT.format(index - 1))
        passes.remove(GRADIENT.format(index), f"input-{index}", f"input-{index + 1}")
    passes.clear()


class _Run:
    """The passes over all windows."""

    def __init__(self, streamed: Streamed, passes: Passes, windows: Tensor, batch: int):
        self.streamed, self.passes, self.windows, self.batch = streamed, passes, windows, batch
        self.layers = list(streamed.blocks)

    def _given(self, start: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[start : start + self.batch].to(self.streamed.device).long()}

    def _hidden(self, index: int, start: int) -> Tensor | None:
        """The input of a block for a batch; None for the first block, which is preceded by the embeddings."""
        if not index:
            return None
        count = min(self.batch, len(self.windows) - start)
        return self.passes.read(f"input-{index}", start, count).to(self.streamed.device)

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Store the output of a block, which is the next one's input."""
        with self.streamed.block(self.layers[index]):
            for start in every(range(0, len(self.windows), self.batch), f"batches of layer {self.layers[index]}, forward"):
                output = self.streamed.output(self._given(start), self._hidden(index, start))
                if not torch.isfinite(output.sum()):
                    raise FloatingPointError(f"the output of {self.streamed.names[self.layers[index]]} is not finite")
                self.passes.write(f"input-{index + 1}", start, output)

    def forward(self, every_s: int) -> None:
        """Store the inputs of every s-th block, and the output of the last one."""
        count = len(self.layers)
        kept = [n for n in range(1, count + 1) if n % every_s == 0 or n == count]
        begin = max((n for n in kept if f"input-{n}" in self.passes.complete), default=0)
        for index in range(begin, count):
            self.step(index)
            if index + 1 in kept:
                self.passes.keep(f"input-{index + 1}")
            if index and index not in kept:
                self.passes.remove(f"input-{index}")

    def refresh(self, index: int, every_s: int) -> None:
        """Store the input of a block, and those between it and the last one that is stored, unless they are."""
        begin = index
        while begin and f"input-{begin}" not in self.passes.files:
            begin -= 1
        for step in range(begin, index):
            self.step(step)

    def start(self, labels: str, seed: int, first: int) -> None:
        """Store the gradient at the output of the last block."""
        count, length = self.windows.shape
        last = len(self.layers) - 1
        step = max(1, LOGITS // self.streamed.vocabulary)
        with self.streamed.passed():
            for window in every(range(count), "windows of the head"):
                ids, hidden = self.windows[window : window + 1], self.passes.read(f"input-{last + 1}", window, 1)
                uniform, gradient = draws(seed, first + window, length), torch.zeros_like(hidden)
                for part in (slice(begin, min(begin + step, length)) for begin in range(0, length, step)):
                    leaf = hidden[:, part].to(self.streamed.device).requires_grad_()
                    with torch.enable_grad():
                        logits = self._logits(leaf, ids[:, part])
                        targets = ids[0, 1:][part] if labels == "text" else sampled(logits.detach(), uniform[part])
                        own = logits[: len(targets)]  # the last token of a window has no label in the text
                        loss = nn.functional.cross_entropy(own, targets.to(own.device).long(), reduction="sum")
                    (gradient[:, part],) = torch.autograd.grad(loss, leaf)
                self.passes.write(GRADIENT.format(last), window, gradient)
        self.passes.keep(GRADIENT.format(last))

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
                    gradient = self.passes.read(GRADIENT.format(index), start, len(output)).to(output)
                    output.backward(gradient)
                    if hidden is not None:
                        assert hidden.grad is not None
                        self.passes.write(GRADIENT.format(index - 1), start, hidden.grad)
        finally:
            if embedded is not None:
                embedded.remove()


def _needs_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()
