"""Runs a model that is larger than memory block by block: load the weights of a block, pass all windows, load the next block.

For every block the model's own forward runs, so that masks, positions and rotary embeddings are correct; blocks that are not
loaded compute nothing and pass on hidden states from files. Modules outside of the blocks are loaded on first use; the embeddings
are freed after the first block.
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.checkpoint.hf import WinnowConfig
from winnow.checkpoint.layouts import install, matrix_shape
from winnow.errors import InputError
from winnow.io.artifacts import file_digest, read_json, write_json
from winnow.io.hidden_states import HiddenStates
from winnow.io.records import Provenance
from winnow.io.tensors import TensorFile
from winnow.models.architectures import blocks_of
from winnow.models.classes import empty_model
from winnow.models.files import weight_files
from winnow.models.naming import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
M_MMAP_THRESHOLD = -3  # of malloc.h
NAMES = ("hidden", "compared")  # file names for the models of one artefact


def give_back_memory() -> None:
    """Make glibc return freed memory to the system. By default it caches blocks of up to 32 MB, hundreds of MB in total, which
    raises the peak. Other C libraries are left unchanged."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 1 << 17)


def no_router_losses(model: PreTrainedModel) -> None:
    """Have a mixture of experts give no loss of its routers, which needs what all blocks output."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


def hidden_of(block: nn.Module, output: Any) -> tuple[Tensor, int | None]:
    """(the hidden states that a block outputs; the number of its other outputs, None if it gives no tuple). Raises InputError if
    it also outputs other tensors."""
    if isinstance(output, Tensor):
        return output, None
    if any(value is not None for value in output[1:]):
        raise InputError(f"{type(block).__name__} outputs more than hidden states; it cannot be streamed or compared")
    return output[0], len(output) - 1


class Streamed:
    """A model from a directory, dense or compressed, that is run block by block on `device`.

    Hidden states are stored beside `artefact` in hidden files until `clear`. With a `provenance`, a process continues after the
    last block that was completed by a process of the same provenance. Raises InputError as `load_model` does.
    """

    def __init__(
        self,
        directory: Path | str,
        dtype: str,
        device: str,
        artefact: Path | str,
        length: int,
        provenance: Provenance | None = None,
        name: str = NAMES[0],
        frugal: bool = True,
    ):
        """`frugal`: at once give back memory that is freed, for jobs that run with little."""
        if frugal:
            give_back_memory()
        files = weight_files(directory)
        self.dtype, self.device, self.length = getattr(torch, dtype), device, length
        self.model = empty_model(directory, dtype).eval().requires_grad_(False)
        no_router_losses(self.model)
        if config := getattr(self.model.config, "quantization_config", None):  # of winnow: others are refused
            install(self.model, WinnowConfig(**config).layers)
        self.places = stored_tensors(self.model, files)
        self.files = {file: TensorFile(file) for file in files}
        names = blocks_of(self.model.config.model_type, self.model.state_dict())
        self.names = names
        self.blocks = {layer: self.model.get_submodule(name) for layer, name in names.items()}
        self.embeddings: nn.Module = self.model.get_input_embeddings()
        self.embedded = next(name for name, module in self.model.named_modules() if module is self.embeddings)
        self.vocabulary, self.width = matrix_shape(self.embeddings)
        self._given: Tensor = torch.empty(0)  # output of blocks that are not loaded
        self._others: int | None = None  # number of outputs of a block besides hidden states; None if unknown or without any
        self._prepare()
        self.prefix = Path(artefact).with_name(f".{Path(artefact).name}.{name}")
        self.provenance = None if provenance is None else json.loads(json.dumps(provenance))
        self.stored: HiddenStates | None = None
        self.written: HiddenStates | None = None
        self.done = self._restore()

    def _prepare(self) -> None:
        """Empty the stored buffers and move the others to the device; modules outside of the blocks load their tensors when they
        are called."""
        inside = tuple(f"{name}." for name in self.names.values())
        for name, module in self.model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                stored = key not in module._non_persistent_buffers_set
                module._buffers[key] = buffer.to("meta" if stored else self.device)
            held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            if not f"{name}.".startswith(inside) and any(tensor.is_meta for _, tensor in held):
                module.register_forward_pre_hook(self._reader(name))

    def _reader(self, name: str) -> Any:
        def read(module: nn.Module, _args: Any) -> None:
            if "forward" not in vars(module):  # its forward is not replaced
                self._load(name, module, {})
            for owner in getattr(module, "tied_to", ()):  # of a head: rounded embeddings, which have its matrix
                self._load(self.embedded, owner, {})

        return read

    def _load(self, name: str, module: nn.Module, read: dict[str, nn.Parameter]) -> None:
        """Load the tensors of a module itself; `read`: parameters already loaded by other modules, by name, which are shared."""
        prefix = f"{name}." if name else ""
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_meta:
                continue
            whole = f"{prefix}{key}"
            if whole not in self.places:
                whole = self.model.all_tied_weights_keys[whole]
            if whole not in read:
                place = self.places[whole]
                dtype = self.dtype if tensor.is_floating_point() else None
                value = self.files[place.file].read(place.key, dtype).to(self.device)
                if not isinstance(tensor, nn.Parameter):
                    module._buffers[key] = value
                    continue
                read[whole] = nn.Parameter(value, requires_grad=False)
            module._parameters[key] = read[whole]

    def _unload(self, module: nn.Module) -> None:
        """Free the tensors of a module and its submodules."""
        for part in module.modules():
            for key, parameter in part.named_parameters(recurse=False):
                part._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            for key, buffer in part.named_buffers(recurse=False):
                if key not in part._non_persistent_buffers_set:
                    part._buffers[key] = buffer.to("meta")

    def _hand_on(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._given if self._others is None else (self._given, *[None] * self._others)

    def _take(self, module: nn.Module, _args: Any, output: Any) -> None:
        self._given, self._others = hidden_of(module, output)

    def _no_embedding(self, ids: Tensor) -> Tensor:
        """Replaces embeddings that are no longer needed: the first block ignores its input."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(*ids.shape, self.width)

    @contextmanager
    def _replaced(self, modules: dict[nn.Module, Any]) -> Iterator[None]:
        """Context manager that replaces the forward of modules."""
        for module, function in modules.items():
            module.forward = function
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def remaining(self) -> list[int]:
        """The layers still to be run, in order."""
        return list(self.blocks)[self.done :]

    @contextmanager
    def loaded(self, layer: int) -> Iterator[nn.Module]:
        """Context manager in which the weights of the block of `layer` are in memory; it can be called."""
        block, read = self.blocks[layer], dict[str, nn.Parameter]()
        for name, module in block.named_modules(prefix=self.names[layer]):
            self._load(name, module, read)
        try:
            yield block
        finally:
            read.clear()
            self._unload(block)

    @contextmanager
    def block(self, layer: int) -> Iterator[None]:
        """Context manager in which the block of `layer` is loaded and `run` passes windows through it."""
        first = next(iter(self.blocks)) == layer
        others: dict[nn.Module, Any] = {other: self._hand_on for own, other in self.blocks.items() if own != layer}
        if not first:
            others[self.embeddings] = self._no_embedding
        with self.loaded(layer) as block:
            hook = block.register_forward_hook(self._take)
            try:
                with self._replaced(others):
                    yield
            finally:
                hook.remove()
                if first:
                    self._unload(self.embeddings)

    def output(self, given: dict[str, Tensor], hidden: Tensor | None) -> Tensor:
        """The hidden states (windows, length, width) that the loaded block outputs for its input `hidden`; the first block has
        none, since the embeddings precede it. `given`: the model inputs, with `input_ids` (windows, length)."""
        count, length = given["input_ids"].shape
        if hidden is not None:
            self._given = hidden
        self.model.base_model(**given, use_cache=False)
        x = self._given
        if x.is_meta or x.shape[:2] != (count, length):
            of = f"{count} windows of {length} tokens"
            raise InputError(
                f"{type(self.model).__name__} outputs hidden states {tuple(x.shape)} for {of}; it cannot be streamed"
            )
        return x

    def run(self, first: int, given: dict[str, Tensor]) -> Tensor:
        """Run windows from `first` on through the loaded block, see `output`; stores and returns the hidden states."""
        count, length = given["input_ids"].shape
        hidden = None if self.stored is None else self.stored.read(first, count, slice(0, length)).to(self.device)
        x = self.output(given, hidden)
        if self.written is None:
            path = self.prefix.with_name(f"{self.prefix.name}-{self.done % 2}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self.written = HiddenStates(path, self.length, x.shape[2], x.dtype)
        self.written.write(first, x)
        return x

    def advance(self, layer: int) -> None:
        """Mark the block of `layer` as done: all windows have passed it, and its results are saved."""
        assert self.written is not None
        assert list(self.blocks)[self.done] == layer
        old, self.stored, self.written, self.done = self.stored, self.written, None, self.done + 1
        if self.provenance is not None:
            new = self.stored
            facts = {"done": self.done, "others": self._others, "width": new.width, "digest": file_digest(new.path)}
            dtype = str(new.dtype).removeprefix("torch.")
            write_json(self._state(), {**facts, "dtype": dtype, "of": self.provenance})
        if old is not None:
            old.path.unlink()

    def _state(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.json")

    def _restore(self) -> int:
        """The number of blocks completed by a process of the same provenance, whose hidden states are reused."""
        if self.provenance is None or not self._state().is_file():
            return 0
        try:
            state = read_json(self._state())
        except (InputError, ValueError) as error:
            log.info("starting over: %s", error)
            return 0
        path = self.prefix.with_name(f"{self.prefix.name}-{(state['done'] - 1) % 2}")
        if state["of"] != self.provenance or not path.is_file() or file_digest(path) != state["digest"]:
            log.info("starting over: the hidden states in %s are from another job, or damaged", path)
            return 0
        log.info("resuming after block %d", state["done"])
        self.stored = HiddenStates(path, self.length, state["width"], getattr(torch, state["dtype"]))
        self._others = state["others"]
        return int(state["done"])

    def trust(self, safe: Collection[int]) -> None:
        """Start over from the first block unless the results of all completed layers are in `safe`."""
        if not set(list(self.blocks)[: self.done]) <= set(safe):
            log.info("starting over: the results of earlier blocks are missing")
            self.stored, self.done = None, 0

    def take(self, states: HiddenStates, others: int | None) -> None:
        """Take the hidden states of the last block from elsewhere: no block is run. `others`: as `hidden_of` gives it."""
        self.stored, self._others, self.done = states, others, len(self.blocks)

    @property
    def others(self) -> int | None:
        """As `hidden_of` gives it for the blocks."""
        return self._others

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Context manager in which `logits` computes logits from the hidden states of the last block."""
        others: dict[nn.Module, Any] = {block: self._hand_on for block in self.blocks.values()}
        with self._replaced({**others, self.embeddings: self._no_embedding}):
            yield

    def logits(self, window: int, ids: Tensor, tokens: slice) -> Tensor:
        """(tokens, vocabulary): logits at some tokens of a window with `ids` (length,); they depend only on the hidden states of
        these tokens."""
        assert self.stored is not None
        return self.logits_of(self.stored.read(window, 1, tokens), ids[None, tokens])[0]

    def logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of the last block's output (windows, tokens, width) for tokens with `ids` (windows, tokens). Raises InputError
        for a model without logits."""
        self._given = hidden.to(self.device)
        found = getattr(self.model(input_ids=ids.to(self.device).long(), use_cache=False), "logits", None)
        if found is None:
            raise InputError(f"{type(self.model).__name__} has no logits")
        return found

    def release(self) -> None:
        """Free the tensors of all modules outside of the blocks; they are loaded again on the next use."""
        self._unload(self.model)
        self._given = torch.empty(0)

    def clear(self) -> None:
        """Remove the files beside the artefact."""
        for path in (self._state(), *(self.prefix.with_name(f"{self.prefix.name}-{n}") for n in (0, 1))):
            path.unlink(missing_ok=True)


def clear_left(artefact: Path | str) -> None:
    """Remove all hidden states beside a finished artefact, whichever process wrote them."""
    for name in NAMES:
        for dots in (".", ".."):  # two: of a file that was being written
            for path in Path(artefact).parent.glob(f"{dots}{Path(artefact).name}.{name}[-.]*"):
                path.unlink()
