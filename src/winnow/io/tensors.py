"""Tensors in safetensors files, read and written one at a time.

Uses plain reads and writes: memory-mapped data counts as memory of the process, and a whole file may count at once if the
operating system limits mapped memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from winnow.errors import InputError
from winnow.io.records import Shaped

if TYPE_CHECKING:
    import torch

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "U8": "uint8", "I8": "int8", "BOOL": "bool",
}  # fmt: skip
ORDER = (
    "I64",
    "F64",
    "F32",
    "I32",
    "BF16",
    "F16",
    "I16",
    "I8",
    "U8",
    "BOOL",
)  # order of tensors in a file, so that all are aligned
CHUNK = 1 << 20  # bytes copied, or numbers converted, at a time


class TensorHeader(Shaped):
    """What a safetensors file says of a tensor."""

    dtype: str
    data_offsets: list[int]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """{tensor: its dtype, shape and offsets} of a safetensors file, without reading tensors. Raises InputError if the file is
    incomplete or not safetensors."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length if length <= min(1 << 27, path.stat().st_size) else 0))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: incomplete or not a safetensors file") from error
    return {name: record for name, record in header.items() if name != "__metadata__"}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be read into or written from."""
    import torch

    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(data)


def fill(tensor: torch.Tensor, stream: Any) -> bool:
    """Read the bytes of a contiguous CPU tensor from the current position of an unbuffered stream. Returns False if it ends
    early."""
    rest = bytes_of(tensor)
    while len(rest):
        count = stream.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True


class TensorFile:
    """The tensors of a safetensors file, read on demand; the header must have been checked before."""

    def __init__(self, path: Path):
        self.path, self.header = path, read_header(path)
        with open(path, "rb") as stream:
            self.start = 8 + int.from_bytes(stream.read(8), "little")

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor as stored."""
        import torch

        return getattr(torch, NAMES[self.header[key]["dtype"]])

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor as stored, or converted to `dtype` without a second copy. Raises InputError if the file ends within it."""
        import torch

        record, stored = self.header[key], self.dtype(key)
        tensor = torch.empty(record["shape"], dtype=dtype or stored)
        begin, end = record["data_offsets"]
        if end - begin != tensor.numel() * stored.itemsize:
            raise InputError(f"{self.path}: {key} has {end - begin} bytes in the header, which its shape and dtype contradict")
        flat = tensor.reshape(-1)
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start + begin)
            for part in flat.split(CHUNK if tensor.dtype != stored else max(1, len(flat))):
                target = part if part.dtype == stored else torch.empty(len(part), dtype=stored)
                if not fill(target, stream):
                    raise InputError(f"{self.path}: incomplete safetensors file; it ends within {key}")
                if target is not part:
                    part.copy_(target)
        return tensor


class Spooled(NamedTuple):
    """A tensor in a spool, and where it starts."""

    dtype: str
    shape: list[int]
    start: int
    bytes: int


class Spool:
    """Collects the tensors of a safetensors file in a temporary file: the header, which comes first, and the order of the tensors
    are only known at the end."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, Spooled] = {}
        self.bytes = 0

    @classmethod
    def of(cls, path: Path, name: str, dtype: torch.dtype, shape: list[int]) -> Spool:
        """A spool of one tensor, whose bytes are those of a file; `finish` removes it."""
        spool = cls(path)
        spool.bytes = math.prod(shape) * dtype.itemsize
        spool.records[name] = Spooled(_short(dtype), shape, 0, spool.bytes)
        return spool

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor to the temporary file; nothing is kept in memory."""
        tensor = tensor.detach().cpu().contiguous()
        with open(self.path, "ab", buffering=0) as stream:
            rest = bytes_of(tensor)
            while len(rest):
                rest = rest[stream.write(rest) :]
        self.records[name] = Spooled(_short(tensor.dtype), list(tensor.shape), self.bytes, tensor.nbytes)
        self.bytes += tensor.nbytes

    def finish(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the safetensors file, and clear the spool."""
        self.write(path, metadata)
        self.path.unlink()
        self.records, self.bytes = {}, 0

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the safetensors file, byte for byte as `safetensors.torch.save_file` would."""
        names = sorted(self.records, key=lambda name: (ORDER.index(self.records[name].dtype), name))
        header: dict[str, Any] = {"__metadata__": metadata}
        place = 0
        for name in names:
            record = self.records[name]
            offsets = [place, place + record.bytes]
            header[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": offsets}
            place = offsets[1]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.path.touch()
        with open(path, "wb") as target, open(self.path, "rb") as source:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                source.seek(self.records[name].start)
                for part in _parts(self.records[name].bytes):
                    target.write(source.read(part))


def _short(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors files."""
    return next(short for short, long in NAMES.items() if f"torch.{long}" == str(dtype))


def _parts(total: int) -> Iterable[int]:
    """`total` bytes in chunks."""
    return (min(CHUNK, total - start) for start in range(0, total, CHUNK))
