"""Tensors in safetensors files, read and written one at a time.

With plain reads and writes: what is mapped into memory counts as memory of the process, and all of a file at once where the
operating system limits what may be mapped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError

if TYPE_CHECKING:
    import torch

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "U8": "uint8", "I8": "int8", "BOOL": "bool",
}  # fmt: skip


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """{tensor: its dtype, shape and offsets} of a safetensors file, without reading a tensor."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(1 << 27, path.stat().st_size):
            raise InputError(f"{path}: not a whole safetensors file")
        header = json.loads(stream.read(length))
    return {name: record for name, record in header.items() if name != "__metadata__"}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be read into or written from."""
    import torch

    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(data)


class TensorFile:
    """The tensors of a safetensors file, each read when it is asked for; its header has been checked before."""

    def __init__(self, path: Path):
        self.path, self.header = path, read_header(path)
        with open(path, "rb") as stream:
            self.start = 8 + int.from_bytes(stream.read(8), "little")

    def read(self, key: str) -> torch.Tensor:
        """A tensor as stored. Raises InputError if the file ends before it does."""
        import torch

        record = self.header[key]
        tensor = torch.empty(record["shape"], dtype=getattr(torch, NAMES[record["dtype"]]))
        begin, end = record["data_offsets"]
        if end - begin != tensor.nbytes:
            raise InputError(f"{self.path}: {key} is said to have {end - begin} bytes, its shape says {tensor.nbytes}")
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start + begin)
            target = bytes_of(tensor)
            while len(target):
                count = stream.readinto(target)
                if not count:
                    raise InputError(f"{self.path}: not a whole safetensors file; it ends within {key}")
                target = target[count:]
        return tensor
