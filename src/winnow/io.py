"""Reading and writing artefacts: atomic, with their provenance inside, verified when read.

An artefact is a JSON file, a Parquet table, or a bundle: a directory of safetensors files with a `manifest.json` that
is written last and holds the digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch

MANIFEST = "manifest.json"


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` on success, removed on failure. Files and directories alike."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        if partial.is_dir():
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
        else:
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: dict, provenance: dict | None = None) -> None:
    """Write `content`, with the provenance as its last block; NaN and infinity are refused."""
    block = {} if provenance is None else {"provenance": provenance}
    write_text(path, json.dumps({**content, **block}, indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON file of winnow ({error}); delete it and run snakemake again") from error


def write_parquet(path: Path | str, table: pd.DataFrame, provenance: dict) -> None:
    """Write a data frame; the provenance goes into the schema's metadata under `winnow`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({"winnow": json.dumps(provenance)})
    with atomic(path) as partial:
        pq.write_table(arrow, partial)


def read_parquet(path: Path | str) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pandas()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a whole Parquet file ({error}); delete it and run snakemake again") from error


def write_tensors(path: Path | str, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
    """Write a safetensors file; `metadata` is stored as one JSON string under `winnow`."""
    from safetensors.torch import save_file

    block = {"format": "pt", **({} if metadata is None else {"winnow": json.dumps(metadata)})}
    with atomic(path) as partial:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata=block)


def read_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict]:
    """({name: tensor}, metadata) of a file written by `write_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {}).get("winnow", "{}"))
            return {name: stream.get_tensor(name) for name in stream.keys()}, metadata
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); delete it and run snakemake again") from error


def write_manifest(directory: Path | str, content: dict, provenance: dict) -> None:
    """Finish a bundle: record the digest of every file of `directory` in its manifest, which makes it exist."""
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    digests = {str(p.relative_to(directory)): file_digest(p) for p in files}
    write_json(directory / MANIFEST, {**content, "files": digests}, provenance)


class Bundle:
    """A directory of files with a manifest; every file's digest is checked before it is read."""

    def __init__(self, manifest: Path | str):
        self.directory = Path(manifest).parent
        self.manifest = read_json(manifest)

    def path(self, name: str) -> Path:
        """The path of a file of the bundle; InputError if it is missing or was changed since it was written."""
        path, expected = self.directory / name, self.manifest["files"].get(name)
        cure = f"delete {self.directory / MANIFEST} and run snakemake again"
        if expected is None or not path.is_file():
            raise InputError(f"{path}: missing from its bundle; {cure}")
        if file_digest(path) != expected:
            raise InputError(f"{path}: changed since it was written; {cure}")
        return path

    def verify(self) -> Path:
        """Check every file of the bundle; returns its directory."""
        for name in self.manifest["files"]:
            self.path(name)
        return self.directory

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return read_tensors(self.path(name))[0]
