"""The dense model's hidden states after its last block, for all windows of an evaluation: computed once, so that every model
that is compared with it runs the dense model's head alone."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.checkpoint.streaming import NAMES, Streamed, hidden_of
from winnow.errors import InputError
from winnow.io.hidden_states import HiddenStates, read_hidden
from winnow.io.tensors import bytes_of
from winnow.models.architectures import blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.models.files import ModelFiles

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = "others"  # in the metadata of an artefact: see `Streamed.others`


class Keeper:
    """Keeps what the last block of a model in memory outputs, in a hidden file beside the artefact.

    `state`: what a job that goes on must know of the file: SHA-256 of every window; width, dtype by its place in `DTYPES`, and
    `others`, -1 for None.
    """

    def __init__(self, model: PreTrainedModel, artefact: Path | str, windows: int, length: int):
        self.path = Path(artefact).with_name(f".{Path(artefact).name}.{NAMES[0]}-0")
        self.length = length
        self.stored: HiddenStates | None = None
        self.state = {"digests": torch.zeros(windows, 32, dtype=torch.uint8), "facts": torch.zeros(3, dtype=torch.int64)}
        self._given = torch.empty(0)
        last = list(blocks_of(model.config.model_type, model.state_dict()).values())[-1]
        model.get_submodule(last).register_forward_hook(self._take)

    def _take(self, block: nn.Module, _args: Any, output: Any) -> None:
        self._given, others = hidden_of(block, output)
        facts = [self._given.shape[2], DTYPES.index(self._given.dtype), -1 if others is None else others]
        self.state["facts"][:] = torch.tensor(facts)

    @property
    def others(self) -> int | None:
        """See `Streamed.others`."""
        found = int(self.state["facts"][2])
        return None if found < 0 else found

    def holds(self, lengths: list[int]) -> bool:
        """Whether the file has the states of the first windows, of such lengths, as `state` says; if not, it is removed."""
        if lengths and self.path.is_file():
            self.stored = self._file()
            try:
                found = [_digest(self.stored.read(window, 1, slice(0, length))) for window, length in enumerate(lengths)]
                if torch.equal(torch.stack(found), self.state["digests"][: len(lengths)]):
                    return True
            except InputError:
                pass  # the file ends before
            log.info("starting over: the hidden states in %s are damaged", self.path)
        self.path.unlink(missing_ok=True)
        self.stored = None
        return not lengths

    def _file(self) -> HiddenStates:
        width, dtype, _ = self.state["facts"].tolist()
        return HiddenStates(self.path, self.length, width, DTYPES[dtype])

    def write(self, first: int) -> None:
        """Keep the states of the windows from `first` on, which the model has just passed."""
        if self.stored is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.stored = self._file()
        self.stored.write(first, self._given)
        for window, states in enumerate(self._given, start=first):
            self.state["digests"][window] = _digest(states)


def _digest(states: Tensor) -> Tensor:
    """(32,): SHA-256 of the bytes of states."""
    digest = hashlib.sha256(bytes_of(states.cpu().contiguous())).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


class Compared:
    """What follows the dense model's last block, its final norm and head, on hidden states that were kept."""

    def __init__(self, files: ModelFiles, states: Path | str, dtype: str, device: str, artefact: Path | str, frugal: bool):
        """`states`: the artefact with the hidden states. Raises InputError if these are damaged."""
        self.states, metadata = read_hidden(states)
        self.streamed = Streamed(files.verify(), dtype, device, artefact, self.states.length, name=NAMES[1], frugal=frugal)
        self.streamed.take(self.states, metadata[OTHERS])

    def logits(self, windows: list[int], ids: Tensor) -> Tensor:
        """(windows, tokens, vocabulary): the logits of consecutive windows with `ids` (windows, tokens)."""
        states = self.states.read(windows[0], len(windows), slice(0, ids.shape[1]))
        with self.streamed.passed():
            return self.streamed.logits_of(states, ids)
