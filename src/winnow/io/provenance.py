"""The provenance inside artefacts of every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, provenance_of_markup, read_json
from winnow.io.records import Provenance


def provenance_of(path: Path) -> Provenance:
    """The provenance inside an artefact: JSON, Parquet, safetensors, or the folder of a bundle.

    Raises InputError for a file that holds none.
    """
    if path.is_dir():
        path = path / MANIFEST
    if not path.is_file():
        raise InputError(f"{path}: there is no such artefact")
    found: Any = None
    if path.suffix == ".json":
        found = read_json(path).get("provenance")
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        found = json.loads((pq.read_schema(path).metadata or {}).get(b"winnow", b"null"))
    elif path.suffix in (".svg", ".html"):
        found = provenance_of_markup(path)
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="np") as stream:
            metadata = json.loads((stream.metadata() or {}).get("winnow", "null")) or {}
        found = {key: value for key, value in metadata.get("provenance", metadata).items() if key != "seal"}
    if not found or "rule" not in found:
        raise InputError(f"{path}: holds no provenance; it is not an artefact of winnow, or one for people only")
    return found
