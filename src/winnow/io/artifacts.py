"""Reading and writing artefacts: atomic, with their provenance inside, verified when read.

An artefact is a sealed file (JSON, Parquet, SVG, safetensors), which holds the digest of all its bytes, or a bundle: a
directory of safetensors files with a sealed `manifest.json` that is written last and holds the digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError
from winnow.io.tensors import TensorFile

if TYPE_CHECKING:
    import pandas as pd
    import torch

MANIFEST = "manifest.json"
MARK = b"winnow-sha256:"
BLANK = MARK + b"0" * 64  # where a sealed file keeps the digest of itself, with this in the digest's place
CHUNK = 1 << 20  # bytes of a file that are looked at together
CURE = "delete it and run snakemake again"


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` on success, removed on failure. Files and directories alike."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.partial-*"):  # by a killed job: only one at a time writes an artefact
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
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


def write_note(path: Path, text: str) -> None:
    """Write a small file that only saves work. Several jobs may write it at once; one that may not write there does without."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except PermissionError:
        partial.unlink(missing_ok=True)


_checks: list[Callable[[], None]] = []


def before_sealing(check: Callable[[], None]) -> None:
    """Have this process, which runs one job, call `check` before it seals anything; what it raises leaves nothing written."""
    _checks[:] = [check]


def _seal(path: Path) -> None:
    """Put the digest of the whole file into the place that `BLANK` keeps for it."""
    for check in _checks:
        check()
    place = _place(path)
    with open(path, "r+b") as stream:
        stream.seek(place)
        stream.write(_digest_without(path, place))


def _place(path: Path | str) -> int:
    """Where the digest of a sealed file stands, behind the last `MARK`. Raises ValueError if there is none."""
    found, begin, tail = -1, 0, b""
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            data = tail + chunk
            if (at := data.rfind(MARK)) >= 0:
                found = begin + at
            tail = data[-len(MARK) + 1 :]
            begin += len(data) - len(tail)
    if found < 0:
        raise ValueError(f"{path}: no seal")
    return found + len(MARK)


def _digest_without(path: Path | str, place: int) -> bytes:
    """SHA-256 of a file in hexadecimal, with zeros where its own digest stands; the file is read by chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for part in (place, None):
            while chunk := stream.read(CHUNK if part is None else min(CHUNK, part - stream.tell())):
                digest.update(chunk)
            if part is not None:
                digest.update(BLANK[len(MARK) :])
                stream.seek(place + 64)
    return digest.hexdigest().encode()


def _check_seal(path: Path | str) -> None:
    """InputError if a sealed file is not whole or was changed."""
    try:
        place = _place(path)
        with open(path, "rb") as stream:
            stream.seek(place)
            whole = stream.read(64) == _digest_without(path, place)
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"{path}: changed since it was written, or not of winnow; {CURE}")


def check_whole(path: Path | str) -> None:
    """Raise InputError if an artefact is absent or not whole, or was changed: a sealed file, or a bundle by its manifest."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such artefact")
    _check_seal(path)
    if Path(path).name == MANIFEST:
        Bundle(path).verify()


def _unsealed(path: Path | str) -> bytes:
    """The bytes of a sealed file; InputError if it is not whole or was changed."""
    _check_seal(path)
    return Path(path).read_bytes()


def _check_place(path: Path | str, provenance: dict) -> None:
    """Raise InputError if the file was made for another place: its name is another, or its wildcards are not in its path."""
    if (name := provenance.get("file", Path(path).name)) != Path(path).name:
        raise InputError(f"{path}: made for another place ({name}); {CURE}")
    for name, value in provenance.get("wildcards", {}).items():
        if value not in str(path):
            raise InputError(f"{path}: made for another place ({name} {value}); {CURE}")


def write_json(path: Path | str, content: dict, provenance: dict | None = None) -> None:
    """Write `content`, the provenance as its last block, and a seal; NaN and infinity are refused."""
    block = {} if provenance is None else {"provenance": {**provenance, "file": Path(path).name}}
    with atomic(path) as partial:
        text = json.dumps({**content, **block, "seal": BLANK.decode()}, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        _seal(partial)


def read_json(path: Path | str) -> dict[str, Any]:
    """The content of a file of `write_json`; InputError if it is not whole, was changed, or belongs elsewhere."""
    content = json.loads(_unsealed(path))
    del content["seal"]
    _check_place(path, content.get("provenance", {}))
    return content


def write_markup(path: Path | str, text: str, provenance: dict) -> None:
    """Write SVG or HTML with the provenance and a seal in a comment behind it."""
    block = json.dumps({"provenance": {**provenance, "file": Path(path).name}, "seal": BLANK.decode()})
    block = block.replace("--", "-\\u002d")  # `--` ends comments
    with atomic(path) as partial:
        partial.write_text(f"{text.rstrip()}\n<!-- {block} -->\n", encoding="utf-8")
        _seal(partial)


def read_markup(path: Path | str) -> str:
    """The text given to `write_markup`; InputError if it is not whole, was changed, or belongs elsewhere."""
    text = _unsealed(path).decode()
    _check_place(path, provenance_of_markup(path) or {})
    return text.rstrip().rpartition("\n")[0]


def provenance_of_markup(path: Path | str) -> dict | None:
    """The provenance in a file of `write_markup`; None if there is none."""
    last = Path(path).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
    if not last.startswith('<!-- {"provenance"'):
        return None
    return json.loads(last.removeprefix("<!-- ").removesuffix(" -->"))["provenance"]


def write_parquet(path: Path | str, table: pd.DataFrame, provenance: dict) -> None:
    """Write a data frame; provenance and seal go into the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    with atomic(path) as partial:
        with pq.ParquetWriter(partial, arrow.schema, store_schema=False) as writer:
            writer.write_table(arrow)
            writer.add_key_value_metadata({"winnow": json.dumps({**provenance, "file": Path(path).name}), "seal": BLANK.decode()})
        _seal(partial)


def read_parquet(path: Path | str) -> pd.DataFrame:
    """The table of a file of `write_parquet`; InputError if it is not whole, was changed, or belongs elsewhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(_unsealed(path)))
    _check_place(path, json.loads(table.schema.metadata[b"winnow"]))
    return table.to_pandas()


def write_tensors(path: Path | str, tensors: dict[str, torch.Tensor], metadata: dict | None = None, sealed: bool = False) -> None:
    """Write a safetensors file; `metadata` is stored as one JSON string under `winnow`. A file by itself is `sealed`; one of
    a bundle need not be, since the manifest holds its digest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {**(metadata or {}), **({"seal": BLANK.decode()} if sealed else {})}
    block = {"winnow": json.dumps(own)} if own else {"format": "pt"}  # one key: safetensors writes several in random order
    with atomic(path) as partial:
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata=block)
        except SafetensorError as error:
            if code := re.search(r"\(os error (\d+)\)", str(error)):  # of the operating system: a full disk, a quota
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
            raise
        if sealed:
            _seal(partial)


def read_tensors(
    path: Path | str, sealed: bool = False, names: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """({name: tensor}, metadata) of a file of `write_tensors`, with `names` of those only; InputError if it is not whole, and,
    where it is sealed, if it was changed or belongs elsewhere."""
    from safetensors import SafetensorError, safe_open

    if sealed:
        _check_seal(path)
    try:
        with safe_open(path, framework="np") as stream:  # checks the header; `pt` would map all of the file
            metadata = json.loads((stream.metadata() or {}).get("winnow", "{}"))
            found = [name for name in stream.keys() if names is None or name in names]
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); {CURE}") from error
    metadata.pop("seal", None)
    if sealed:
        _check_place(path, metadata.get("provenance", {}))
    file = TensorFile(Path(path))
    return {name: file.read(name) for name in found}, metadata


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

    def tensors(self, name: str, wanted: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        return read_tensors(self.path(name), names=wanted)[0]
