"""Reading and writing artefacts: written atomically with their provenance, verified when read.

An artefact is a sealed file (JSON, Parquet, SVG, safetensors) that contains the digest of its own bytes, or a bundle: a
directory of safetensors files with a sealed `manifest.json`, written last, that contains the digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError
from winnow.io.symmetric import LOWER, symmetric
from winnow.io.tensors import Spool, TensorFile

if TYPE_CHECKING:
    import pandas as pd
    import torch

MANIFEST = "manifest.json"
MARK = b"winnow-sha256:"
BLANK = MARK + b"0" * 64  # placeholder of a sealed file's own digest, also while the digest is computed
CHUNK = 1 << 20  # bytes of a file that are read at a time
CURE = "delete it and run snakemake again"


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path (file or directory) beside `path`, renamed to `path` on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.partial-*"):  # of a killed job: only one job at a time writes an artefact
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
    """Write a small file that only saves work. Several jobs may write it at once; missing write permission is ignored."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except PermissionError:
        partial.unlink(missing_ok=True)


_checks: list[Callable[[], None]] = []


def before_sealing(check: Callable[[], None]) -> None:
    """Call `check` before this process (one job) seals any artefact; if it raises, nothing is written."""
    _checks[:] = [check]


def _seal(path: Path) -> None:
    """Replace the placeholder `BLANK` by the digest of the whole file."""
    for check in _checks:
        check()
    place = _place(path)
    with open(path, "r+b") as stream:
        stream.seek(place)
        stream.write(_digest_without(path, place))


def _place(path: Path | str) -> int:
    """Offset of the digest in a sealed file, after the last `MARK`. Raises ValueError if there is none."""
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
    """SHA-256 of a file in hexadecimal, with zeros in place of its own digest; the file is read in chunks."""
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
    """Raise InputError if a sealed file is incomplete or was changed."""
    try:
        place = _place(path)
        with open(path, "rb") as stream:
            stream.seek(place)
            whole = stream.read(64) == _digest_without(path, place)
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"{path}: changed since it was written, or not written by winnow; {CURE}")


def check_whole(path: Path | str) -> None:
    """Raise InputError if an artefact (a sealed file, or a bundle by its manifest) is missing, incomplete or was changed."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such artefact")
    _check_seal(path)
    if Path(path).name == MANIFEST:
        Bundle(path).verify()


def _unsealed(path: Path | str) -> bytes:
    """The bytes of a sealed file. Raises InputError if it is incomplete or was changed."""
    _check_seal(path)
    return Path(path).read_bytes()


def _check_place(path: Path | str, provenance: Mapping[str, Any]) -> None:
    """Raise InputError if the file was written for another path: its name differs, or its wildcards are not in the path."""
    if (name := provenance.get("file", Path(path).name)) != Path(path).name:
        raise InputError(f"{path}: written for another path ({name}); {CURE}")
    for name, value in provenance.get("wildcards", {}).items():
        if value not in str(path):
            raise InputError(f"{path}: written for another path ({name} {value}); {CURE}")


def write_json(path: Path | str, content: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
    """Write `content` with the provenance as its last block and a seal. Raises ValueError for NaN and infinity."""
    block = {} if provenance is None else {"provenance": {**provenance, "file": Path(path).name}}
    with atomic(path) as partial:
        text = json.dumps({**content, **block, "seal": BLANK.decode()}, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        _seal(partial)


def read_json(path: Path | str) -> Any:
    """The content of a file of `write_json`. Raises InputError if it is incomplete, changed, or written for another path."""
    content = json.loads(_unsealed(path))
    del content["seal"]
    _check_place(path, content.get("provenance", {}))
    return content


def write_markup(path: Path | str, text: str, provenance: Mapping[str, Any]) -> None:
    """Write SVG or HTML with the provenance and a seal in a comment at its end."""
    block = json.dumps({"provenance": {**provenance, "file": Path(path).name}, "seal": BLANK.decode()})
    block = block.replace("--", "-\\u002d")  # `--` ends comments
    with atomic(path) as partial:
        partial.write_text(f"{text.rstrip()}\n<!-- {block} -->\n", encoding="utf-8")
        _seal(partial)


def read_markup(path: Path | str) -> str:
    """The text given to `write_markup`. Raises InputError if the file is incomplete, changed, or written for another path."""
    text = _unsealed(path).decode()
    _check_place(path, provenance_of_markup(path) or {})
    return text.rstrip().rpartition("\n")[0]


def provenance_of_markup(path: Path | str) -> dict | None:
    """The provenance in a file of `write_markup`; None if there is none."""
    last = Path(path).read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
    if not last.startswith('<!-- {"provenance"'):
        return None
    return json.loads(last.removeprefix("<!-- ").removesuffix(" -->"))["provenance"]


def write_parquet(path: Path | str, table: pd.DataFrame, provenance: Mapping[str, Any]) -> None:
    """Write a data frame, with provenance and seal in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    with atomic(path) as partial:
        with pq.ParquetWriter(partial, arrow.schema, store_schema=False) as writer:
            writer.write_table(arrow)
            writer.add_key_value_metadata({"winnow": json.dumps({**provenance, "file": Path(path).name}), "seal": BLANK.decode()})
        _seal(partial)


def read_parquet(path: Path | str) -> pd.DataFrame:
    """The table of a file of `write_parquet`. Raises InputError if it is incomplete, changed, or written for another path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(_unsealed(path)))
    _check_place(path, json.loads(table.schema.metadata[b"winnow"]))
    return table.to_pandas()


def write_tensors(
    path: Path | str, tensors: dict[str, torch.Tensor], metadata: Mapping[str, Any] | None = None, sealed: bool = False
) -> None:
    """Write a safetensors file, with `metadata` as one JSON string under `winnow`. Single files are `sealed`; files of a bundle
    need not be, since the manifest contains their digests."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {**(metadata or {}), **({"seal": BLANK.decode()} if sealed else {})}
    block = {"winnow": json.dumps(own)} if own else {"format": "pt"}  # one key: safetensors writes several in random order
    with atomic(path) as partial:
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata=block)
        except SafetensorError as error:
            if code := re.search(r"\(os error (\d+)\)", str(error)):  # from the operating system: a full disk, a quota
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
            raise
        if sealed:
            _seal(partial)


def write_spooled(path: Path | str, spool: Spool, metadata: Mapping[str, Any]) -> None:
    """Like `write_tensors`, sealed, of tensors that are in a spool, which is left as it is."""
    with atomic(path) as partial:
        spool.write(partial, {"winnow": json.dumps({**metadata, "seal": BLANK.decode()})})
        _seal(partial)


def read_tensors(
    path: Path | str, sealed: bool = False, names: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """({name: tensor}, metadata) of a file of `write_tensors`, limited to `names` if given; matrices that are stored by half (see
    `winnow.io.symmetric`) are whole. Raises InputError if the file is incomplete or, if sealed, changed or written for another
    path."""
    from safetensors import SafetensorError, safe_open

    if sealed:
        _check_seal(path)
    try:
        with safe_open(path, framework="np") as stream:  # checks the header; `pt` would map all of the file
            metadata = json.loads((stream.metadata() or {}).get("winnow", "{}"))
            found = [name for name in stream.keys() if names is None or name.removesuffix(LOWER) in names]
    except SafetensorError as error:
        raise InputError(f"{path}: incomplete or not a safetensors file ({error}); {CURE}") from error
    metadata.pop("seal", None)
    if sealed:
        _check_place(path, metadata.get("provenance", {}))
    file = TensorFile(Path(path))
    halves = {name for name in found if name.endswith(LOWER)}
    return {n.removesuffix(LOWER): symmetric(file.read(n)) if n in halves else file.read(n) for n in found}, metadata


def write_manifest(directory: Path | str, content: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Finish a bundle: write its manifest with the digest of every file of `directory`."""
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    digests = {str(p.relative_to(directory)): file_digest(p) for p in files}
    write_json(directory / MANIFEST, {**content, "files": digests}, provenance)


class Bundle:
    """A directory of files with a manifest; the digest of every file is checked before the file is read."""

    def __init__(self, manifest: Path | str):
        self.directory = Path(manifest).parent
        self.manifest = read_json(manifest)

    def path(self, name: str) -> Path:
        """The path of a file of the bundle. Raises InputError if it is missing or was changed since it was written."""
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
