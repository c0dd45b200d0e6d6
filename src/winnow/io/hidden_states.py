"""Hidden states of windows in a file, while a model is run block by block, and as an artefact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.errors import InputError
from winnow.io.artifacts import read_tensors, write_spooled, write_tensors
from winnow.io.tensors import Spool, TensorFile, bytes_of, fill

KEY = "hidden"  # of the tensor in an artefact


class HiddenStates:
    """Hidden states (windows, length, width) in a file from byte `start` on, read and written by rows without memory mapping."""

    def __init__(self, path: Path, length: int, width: int, dtype: torch.dtype, start: int = 0):
        self.path, self.length, self.width, self.dtype, self.start = path, length, width, dtype, start
        self.token = width * dtype.itemsize

    def write(self, first: int, x: Tensor) -> None:
        """Store x (windows, at most length, width) for the windows from `first` on."""
        path = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for row, window in enumerate(x.to("cpu", self.dtype).contiguous()):
                rest, place = bytes_of(window), self.start + (first + row) * self.length * self.token
                while len(rest):
                    done = os.pwrite(path, rest, place)
                    rest, place = rest[done:], place + done
        finally:
            os.close(path)

    def read(self, first: int, windows: int, tokens: slice) -> Tensor:
        """(windows, tokens, width) from window `first` on."""
        x = torch.empty(windows, tokens.stop - tokens.start, self.width, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as stream:
            for row, window in enumerate(x):
                stream.seek(self.start + ((first + row) * self.length + tokens.start) * self.token)
                if not fill(window, stream):
                    raise InputError(f"{self.path}: truncated while in use; run snakemake again")
        return x


def write_hidden(path: Path | str, states: HiddenStates | None, windows: int, metadata: Mapping[str, Any]) -> None:
    """Make an artefact, a sealed safetensors file, of hidden states of so many windows, whose own file stays; of None one without
    tensors. Tokens that were not written are zeros."""
    if states is None:
        write_tensors(path, {}, metadata, sealed=True)
        return
    shape = [windows, states.length, states.width]
    os.truncate(states.path, windows * states.length * states.token)
    write_spooled(path, Spool.of(states.path, KEY, states.dtype, shape), metadata)


def read_hidden(path: Path | str) -> tuple[HiddenStates, dict[str, Any]]:
    """(hidden states, which are read on demand; metadata) of a file of `write_hidden`. Raises InputError if it is incomplete,
    changed, or written for another path."""
    _, metadata = read_tensors(path, sealed=True, names=())
    file = TensorFile(Path(path))
    record = file.header[KEY]
    _, length, width = record["shape"]
    return HiddenStates(Path(path), length, width, file.dtype(KEY), file.start + record["data_offsets"][0]), metadata
