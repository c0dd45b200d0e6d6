"""Exports a checkpoint as one GGUF file, which llama.cpp and the programs that are built on it load without winnow.

Rounded matrices are stored in blocks of 32 inputs with the numbers of the checkpoint, wherever a block type has their integers;
the codes of 2 and 3 bits take 4 in the file. All other matrices are multiplied out, without dropped neurons, and stored in
floating point or in blocks of 8 bits; what that rounds is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGUFWriter, Keys, LlamaFileType, get_tensor_name_map
from torch import Tensor

from winnow.checkpoint.card import Exported
from winnow.checkpoint.export import ORIGINAL, Checkpoint, Rounding, write_card
from winnow.checkpoint.measured import Measured
from winnow.engines.gguf.blocks import FLOATS, Q8_0, RANGES, Data, Grid, Type, in_floats, in_q8_0
from winnow.engines.gguf.families import family_of
from winnow.engines.gguf.hyperparameters import Entries
from winnow.engines.gguf.matrices import Matrices
from winnow.engines.gguf.tokenizer import entries
from winnow.errors import InputError, first_line
from winnow.io.records import Provenance
from winnow.models.files import weight_files

FILE = "model.gguf"
USE = """```python
from llama_cpp import Llama

model = Llama("model.gguf")
```

`model.gguf` needs llama.cpp, or a program that is built on it, and not winnow. {what} The file has {{exported:,}} bytes (weights
of the checkpoint {{compressed:,}}, of the dense model {{dense:,}}). llama.cpp rounds the inputs of matrices in blocks to 8 bits,
and those of float16 and bfloat16 matrices to their dtype, so its logits are near those of the checkpoint, and not equal."""
FILE_TYPES = {kind: f"MOSTLY_{kind.name}" for kind in (*RANGES, Type.F16, Type.BF16)} | {Type.F32: "ALL_F32"}


class Types(NamedTuple):
    """The types asked for: `original` or a dtype, or `q8_0` for the last two."""

    dtype: str  # of every tensor without another type
    matrices: str  # of the compressible matrices that are not stored exactly in blocks
    embeddings: str  # of the embeddings and of the output matrix


class _File:
    """Writes tensors to a spool, since the header of a GGUF file names them all, and then the file."""

    def __init__(self, directory: Path):
        self.directory, self.spool = directory, directory / ".spool"
        self.records: dict[str, tuple[Type, tuple[int, ...], np.dtype]] = {}
        self.bytes: Counter[Type] = Counter()

    def add(self, name: str, data: Data) -> None:
        with open(self.spool, "ab") as stream:
            stream.write(data.array.data if data.array.flags.c_contiguous else data.array.tobytes())
        self.records[name] = (data.type, data.array.shape, data.array.dtype)
        self.bytes[data.type] += data.array.nbytes

    def finish(self, arch: str, values: dict[str, Any]) -> int:
        """Write the file with these entries and remove the spool; returns the bytes of the file."""
        path = self.directory / FILE
        writer = GGUFWriter(path, arch)
        for key, value in values.items():
            _put(writer, key, value)
        for name, (kind, shape, dtype) in self.records.items():
            writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        start = 0
        for _, shape, dtype in self.records.values():
            tensor = np.memmap(self.spool, dtype, "r", start, shape)
            writer.write_tensor_data(tensor)
            start += tensor.nbytes
        writer.close()
        self.spool.unlink()
        return path.stat().st_size


def _put(writer: GGUFWriter, key: str, value: Any) -> None:
    """One entry; every number in the type that llama.cpp reads it in."""
    adders: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders[list] = writer.add_array
    adders[type(value)](key, value)


class _Export:
    def __init__(self, checkpoint: Checkpoint, types: Types):
        self.checkpoint, self.types = checkpoint, types
        self.config = checkpoint.dense.config
        self.where = checkpoint.directory / "config.json"
        self.family = family_of(self.config.model_type, self.where)
        self.matrices = Matrices(checkpoint, types.matrices == Q8_0)
        self.hyperparameters = Entries(self.config, self.family, self.matrices.lengths, self.where)
        self.frequencies = self.hyperparameters.frequency_factors()
        self.values = {**self.hyperparameters.all(), **entries(checkpoint.directory, self.config)}
        self.names = get_tensor_name_map(self.hyperparameters.arch, self.config.num_hidden_layers)
        self.rounding = Rounding(types.dtype)
        self.exact: Counter[str] = Counter()  # compressed matrices with the numbers of the checkpoint, by type
        self.others: Counter[str] = Counter()  # the other compressed matrices

    def name(self, name: str) -> str:
        """The name of a tensor in the file."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{self.checkpoint.directory}: {name}: llama.cpp has no such tensor in this family")
        return found

    def data(self, name: str, tensor: Tensor, original: torch.dtype, asked: str) -> Data:
        """A tensor in the type asked for, with what that rounds. Raises InputError, naming it, if that is impossible."""
        try:
            if asked == Q8_0:
                data, near = in_q8_0(tensor)
                self.rounding.add(tensor, near)
                return data
            dtype = (original if original in FLOATS else torch.float32) if asked == ORIGINAL else getattr(torch, asked)
            if torch.promote_types(tensor.dtype, dtype) != dtype:
                self.rounding.add(tensor, tensor.to(dtype))
            return in_floats(tensor, dtype)
        except ValueError as error:
            raise InputError(f"{self.checkpoint.directory}: {name}: {first_line(error)}") from error

    def tensors(self) -> Iterator[tuple[str, Data]]:
        """Every tensor of the file, one at a time: matrices first."""
        done = set()
        for own in self.matrices:
            m = own.matrix
            done |= {f"{m.module}.weight", f"{m.module}.bias"}
            if isinstance(own.content, Grid):
                data, kept = own.content.data(), self.exact
            else:
                data, kept = self.data(m.module, own.content, own.dtype, self.types.matrices), self.others
            if m.module in self.checkpoint.layouts:
                kept[data.type.name] += 1
            yield self.name(f"{m.module}.weight"), data
            if own.bias is not None:
                yield self.name(f"{m.module}.bias"), in_floats(own.bias, torch.float32)
        for own in self.matrices.rounded_outer():
            m = own.matrix
            if isinstance(own.content, Grid):
                data, kept = own.content.data(), self.exact
            else:
                data, kept = self.data(m.module, own.content, own.dtype, self.types.embeddings), self.others
            kept[data.type.name] += 1
            names = [m.module, *([m.head] if m.head and self.family.output else [])]
            done |= {f"{name}.weight" for name in (m.module, m.head)}
            for name in names:
                yield self.name(f"{name}.weight"), data
        if self.frequencies is not None:
            yield "rope_freqs.weight", in_floats(self.frequencies, torch.float32)
        yield from self._others(done)

    def _others(self, done: set[str]) -> Iterator[tuple[str, Data]]:
        """Embeddings, norms, and the output matrix unless llama.cpp uses the embeddings in its place."""
        tied = set(self.checkpoint.dense.all_tied_weights_keys)
        for name in self.checkpoint.dense.state_dict():
            if name in done or (name in tied and name not in self.checkpoint.places and not self.family.output):
                continue
            tensor = self.checkpoint.tensor(name)
            if tensor.ndim == 1:  # llama.cpp only adds and multiplies vectors in float32
                yield self.name(name), in_floats(tensor.float() + self.family.shift, torch.float32)
            else:
                asked = self.types.dtype if name.endswith("wpe.weight") else self.types.embeddings
                yield self.name(name), self.data(name, tensor, tensor.dtype, asked)


def export_gguf(
    source: Path,
    directory: Path,
    provenance: Provenance | None,
    measured: list[Measured] | None = None,
    dtype: str = ORIGINAL,
    matrices: str | None = None,
    embeddings: str | None = None,
) -> Exported:
    """Write the checkpoint `source` as `model.gguf` in a new directory, with recipe, card and manifest; returns the bytes of the
    file, and the relative rounding error of what is not stored exactly.

    `dtype`: of tensors that are stored in floating point; by default that of the model. `matrices`: the type of the FFN and
    attention matrices that are not stored exactly in blocks, `embeddings`: of the embeddings and the output matrix; dtypes, or
    `q8_0` for blocks of 8 bits, by default `dtype`. Norms and biases are always float32. Raises InputError for a checkpoint that
    is damaged, and, naming it, for a family, an option of the config, a structure or a tokenizer that llama.cpp lacks."""
    checkpoint = Checkpoint(source)
    export = _Export(checkpoint, Types(dtype, matrices or dtype, embeddings or dtype))
    directory.mkdir(parents=True)
    file = _File(directory)
    for name, data in export.tensors():
        file.add(name, data)
    most = max(file.bytes, key=file.bytes.__getitem__)
    values = {
        Keys.General.DESCRIPTION: f"compressed by winnow {version('winnow')}",
        Keys.General.FILE_TYPE: int(LlamaFileType[FILE_TYPES[most]]),
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
        **export.values,
    }
    total = file.finish(MODEL_ARCH_NAMES[export.hyperparameters.arch], values)
    exported = _described(export, total, most)
    write_card(source, directory, exported, measured, provenance)
    return exported


def _described(export: _Export, total: int, most: Type) -> Exported:
    """The export in words: how many matrices keep their numbers, and what the others and the whole cost."""
    error, lengths = export.rounding.error(), export.matrices.lengths
    every = sum(export.exact.values()) + sum(export.others.values())
    parts = []
    for counts, what in ((export.exact, "have the numbers of the checkpoint"), (export.others, "are multiplied out")):
        if counts:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            parts.append(f"{sum(counts.values())} of {every} compressed matrices {what} ({kinds})")
    parts.append(f"what is rounded has a relative error of {error:.1e}")
    if len(set(lengths)) > 1:
        parts.append(f"FFNs have lengths from {min(lengths)} to {max(lengths)}")
    if (context := export.hyperparameters.context()) < export.config.max_position_embeddings:
        parts.append(f"the context is limited to {context} tokens, the window of its attention, which llama.cpp lacks")
    text = "; ".join(parts)
    stored = sum(path.stat().st_size for path in weight_files(export.checkpoint.directory))
    said = f"{total / stored:.2f} of the checkpoint's {stored:,}; {text}; llama.cpp loads it, without winnow"
    return Exported(total, most.name, error, "for llama.cpp", USE.format(what=text[0].upper() + text[1:] + "."), said)
