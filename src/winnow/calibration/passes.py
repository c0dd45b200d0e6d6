"""Files of a job that collects gradients block by block: hidden states and their gradients, and sums of layers.

A job runs its windows in portions. The sums of a layer over the portions up to number p are a file of their own, made from that
of p - 1, which is removed once a state file names the new one. So a portion cannot be added twice, whenever a job is killed.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from winnow.calibration.gradients import OutputMoments
from winnow.calibration.merging import summed
from winnow.calibration.stored import stored
from winnow.errors import InputError
from winnow.io.artifacts import file_digest, read_json, write_json, write_tensors
from winnow.io.hidden_states import HiddenStates

if TYPE_CHECKING:
    from collections.abc import Collection

    from winnow.checkpoint.streaming import Streamed
    from winnow.io.records import Provenance

log = logging.getLogger(__name__)
INPUT = "input"  # hidden states at the input of the block of an index, of a portion
GRADIENT = "gradient"  # the gradient at the output of the block of an index, of a portion
SUMS = "sums"  # the sums of the layer of an index over all portions up to one


class Piece(NamedTuple):
    """A file, by its name."""

    portion: int
    kind: str
    place: int  # index of a block, or the number of a layer

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @classmethod
    def of(cls, name: str) -> Piece:
        portion, kind, index = name.split("-")
        return cls(int(portion), kind, int(index))


class Passes:
    """The files beside the artefact of `streamed`. With a `provenance`, those that a process of the same provenance and the same
    `portions` has completed are used again, and all others are removed."""

    def __init__(self, streamed: Streamed, portions: list[slice], provenance: Provenance | None = None):
        self.streamed = streamed
        self.starts = [portion.start for portion in portions]
        self.provenance = None if provenance is None else json.loads(json.dumps(provenance))
        self.complete: dict[Piece, str] = {}  # with the digest of the file
        self.files: dict[Piece, HiddenStates] = {}
        self.kind: tuple[int, str] | None = None  # width and dtype of hidden states
        self._restore()
        for path in self._paths():
            if path not in {self.path(piece) for piece in self.complete}:
                path.unlink()

    def path(self, piece: Piece) -> Path:
        prefix = self.streamed.prefix
        return prefix.with_name(f"{prefix.name}-{piece}")

    def write(self, piece: Piece, first: int, x: Tensor) -> None:
        """Store x (windows, length, width) for the windows of a portion from its window `first` on."""
        if piece not in self.files:
            path = self.path(piece)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self.kind = (x.shape[2], str(x.dtype).removeprefix("torch."))
            self.files[piece] = HiddenStates(path, self.streamed.length, x.shape[2], x.dtype)
        self.files[piece].write(first, x.detach())

    def read(self, piece: Piece, first: int, count: int) -> Tensor:
        return self.files[piece].read(first, count, slice(0, self.streamed.length))

    def add(self, portion: int, layer: int, sums: dict[str, dict[str, Tensor]]) -> None:
        """Store the sums of a layer, {role: tensors of its `OutputMoments`}, over all portions up to one."""
        write_tensors(self.path(Piece(portion, SUMS, layer)), stored(sums))

    def summed(self, portion: int, layer: int, role: str, precision: torch.dtype) -> OutputMoments:
        """What `add` stored of a role."""
        return summed(self.path(Piece(portion, SUMS, layer)), role, OutputMoments, precision)

    def added(self, layer: int) -> int:
        """The last portion that is in the stored sums of a layer; -1 if there are none."""
        return max((p.portion for p in self.complete if p.kind == SUMS and p.place == layer), default=-1)

    def keep(self, *pieces: Piece) -> None:
        """Keep files, which are complete, for later processes: all of them, or none if the process is killed here."""
        self.complete |= {piece: file_digest(self.path(piece)) for piece in pieces}
        self._save()

    def remove(self, *pieces: Piece) -> None:
        if any([self.complete.pop(piece, None) for piece in pieces]):
            self._save()
        for piece in pieces:
            self.files.pop(piece, None)
            self.path(piece).unlink(missing_ok=True)

    def tidy(self, portion: int, last: int | None, finished: Collection[int]) -> None:
        """Remove what a killed process has left and nobody needs: a job that goes on in `portion` from the gradient at the output
        of block `last`, or from the first block, needs inputs up to there, that gradient, and the last sums of the layers that
        are not `finished`."""

        def needed(piece: Piece) -> bool:
            if piece.kind == SUMS:
                return piece.portion == self.added(piece.place) and piece.place not in finished
            reached = piece.place == last if piece.kind == GRADIENT else last is None or piece.place <= last
            return piece.portion == portion and reached

        self.remove(*[piece for piece in self.complete if not needed(piece)])

    def clear(self) -> None:
        """Remove all files beside the artefact."""
        for path in self._paths():
            path.unlink()
        self._state().unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        """The files that exist, with those that a killed process was writing."""
        prefix = self.streamed.prefix
        return [path for dots in ("", ".") for path in prefix.parent.glob(f"{dots}{prefix.name}-*")]

    def _state(self) -> Path:
        prefix = self.streamed.prefix
        return prefix.with_name(f"{prefix.name}.json")

    def _save(self) -> None:
        if self.provenance is not None:
            complete = {str(piece): digest for piece, digest in self.complete.items()}
            write_json(self._state(), {"complete": complete, "kind": self.kind, "starts": self.starts, "of": self.provenance})

    def _restore(self) -> None:
        if self.provenance is None or not self._state().is_file():
            return
        try:
            state = read_json(self._state())
        except (InputError, ValueError) as error:
            log.info("starting over: %s", error)
            return
        if (state.get("of"), state.get("starts")) != (self.provenance, self.starts):
            log.info("starting over: files in %s are from another job, or of other portions", self.streamed.prefix.parent)
            return
        width, dtype = self.kind = tuple(state["kind"])
        for name, digest in state["complete"].items():
            piece = Piece.of(name)
            path = self.path(piece)
            if path.is_file() and file_digest(path) == digest:
                self.complete[piece] = digest
                if piece.kind != SUMS:
                    self.files[piece] = HiddenStates(path, self.streamed.length, width, getattr(torch, dtype))
