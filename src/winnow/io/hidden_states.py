"""Hidden states of windows in a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from winnow.errors import InputError
from winnow.io.tensors import bytes_of, fill


class HiddenStates:
    """Hidden states (windows, length, width) in a file, read and written by rows without memory mapping."""

    def __init__(self, path: Path, length: int, width: int, dtype: torch.dtype):
        self.path, self.length, self.width, self.dtype = path, length, width, dtype
        self.token = width * dtype.itemsize

    def write(self, first: int, x: Tensor) -> None:
        """Store x (windows, at most length, width) for the windows from `first` on."""
        path = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for row, window in enumerate(x.to("cpu", self.dtype).contiguous()):
                rest, place = bytes_of(window), (first + row) * self.length * self.token
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
                stream.seek(((first + row) * self.length + tokens.start) * self.token)
                if not fill(window, stream):
                    raise InputError(f"{self.path}: truncated while in use; run snakemake again")
        return x
