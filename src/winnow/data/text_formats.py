"""The format of a text's files: from the configuration or else from the file names; the two must not contradict each other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".arrow", ".feather")
WIKITEXT = re.compile(r"wiki\.(train|valid|test)\.(raw|tokens)")
LOOKED_AT = 3  # lines that are checked for JSON objects in a plain text file
LONGEST = 1 << 20  # characters of such a line


def text_format_of(files: Sequence[str], given: str | None) -> str:
    """The format of the files; `given` is that of the configuration. Files with other endings than those above are plain text
    (`raw`) by default. Raises ValueError, with the file, if its ending contradicts `given`, if its format is not supported, or if
    the files have different formats."""
    found = {file: _by_ending(file, given) for file in files}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{file} as {form}" for file, form in found.items())
        raise ValueError(f"the files have different formats ({told}); use one text for each, or set `format` if it is the same")
    return next(iter(found.values()), given or "raw")


def _by_ending(file: str, given: str | None) -> str:
    ending = Path(file).suffix.lower()
    if ending in PACKED:
        raise ValueError(f"{file}: compressed files are not supported; decompress it")
    if ending in TABLES:
        raise ValueError(f"{file}: tables are only read from parquet or jsonl; convert its text column to one of these")
    if ending == ".json" and given != "jsonl":
        raise ValueError(f"{file}: if it has one object per line, set `format: jsonl`; if it is one list, convert it to that")
    if given is None and WIKITEXT.fullmatch(Path(file).name):
        raise ValueError(f"{file}: set `format: lines` for the rows of WikiText as papers use them, or `raw` for one row")
    form = FORMATS.get(ending)
    if form and given and form != given:
        raise ValueError(f"{file}: `format: {given}` contradicts the file's ending; remove `format`, or rename the file")
    return form or given or "raw"


def resolved(content: Any) -> Any:
    """A text of the configuration with its format added unless that is `raw`. Raises ValueError as `text_format_of`, and for
    options that have no effect with this format."""
    if not isinstance(content, dict):
        return content
    files, given = content.get("files"), content.get("format")
    if not files:
        if content.get("dataset") and (own := next((key for key in ("format", "separator") if content.get(key)), None)):
            raise ValueError(f"`{own}` is only for local files; remove it, a hub data set has its own rows")
        return content
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files) or not isinstance(given, str | None):
        return content  # reported elsewhere
    form = text_format_of(files, given)
    if content.get("column") and form in ("raw", "lines"):
        raise ValueError(f"`column` is for jsonl and parquet, but {files[0]} is read as {form}; set its `format`")
    if content.get("separator") and form != "raw":
        raise ValueError(f"`separator` splits raw files into rows, but {files[0]} is read as {form}; remove one of them")
    return content if form == "raw" else {**content, "format": form}


def has_objects(file: str) -> bool:
    """Whether the first lines of a plain text file are JSON objects, as in jsonl."""
    try:
        with open(file, encoding="utf-8") as stream:
            lines = (line for line in iter(lambda: stream.readline(LONGEST), "") if line.strip())
            rows = [json.loads(line) for line in islice(lines, LOOKED_AT)]
    except (OSError, ValueError, RecursionError):
        return False
    return bool(rows) and all(isinstance(row, dict) for row in rows)


ROWS = 10_000  # of a task, where its files do not tell


def rows_of(files: list[str]) -> int:
    """Rows of a task's local files as far as lines tell them; ROWS for files of other kinds, and for a data set of the hub."""
    lines = [p for p in map(Path, files) if p.suffix in (".jsonl", ".csv", ".json") and p.is_file()]
    return sum(p.read_bytes().count(b"\n") for p in lines) or ROWS
