"""The format of a text's files: what the configuration says, or else what their names end in; never one against the other."""

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
LOOKED_AT = 3  # lines that tell whether a file of plain text is one of objects
LONGEST = 1 << 20  # characters of such a line


def format_of(files: Sequence[str], given: str | None) -> str:
    """The format that files are read in, of which `given` is what the configuration says. Endings other than those above say
    nothing: such a file is of plain text, `raw`, if nothing is given. Raises ValueError, with the file, for an ending of another
    format than the given one, for what is not read, and for files of several formats."""
    found = {file: _by_ending(file, given) for file in files}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{file} as {form}" for file, form in found.items())
        raise ValueError(f"the files are of several formats ({told}); make a text of each, or say `format` if it is the same")
    return next(iter(found.values()), given or "raw")


def _by_ending(file: str, given: str | None) -> str:
    ending = Path(file).suffix.lower()
    if ending in PACKED:
        raise ValueError(f"{file}: packed files are not read; unpack it")
    if ending in TABLES:
        raise ValueError(f"{file}: tables are read from parquet or jsonl; write its column of text as one of these")
    if ending == ".json" and given != "jsonl":
        raise ValueError(f"{file}: if it has an object per line, say `format: jsonl`; if it is one list, write it so")
    if given is None and WIKITEXT.fullmatch(Path(file).name):
        raise ValueError(f"{file}: say `format: lines` for rows as papers have them of WikiText, or `raw` for one row")
    form = FORMATS.get(ending)
    if form and given and form != given:
        raise ValueError(f"{file}: `format: {given}` is not what its name ends in; leave `format` out, or rename the file")
    return form or given or "raw"


def resolved(content: Any) -> Any:
    """A text of the configuration as it is given, with its format unless that is `raw`. Raises ValueError as `format_of`, and for
    options of another format than the text has, which would change nothing."""
    if not isinstance(content, dict):
        return content
    files, given = content.get("files"), content.get("format")
    if not files:
        if content.get("dataset") and (own := next((key for key in ("format", "separator") if content.get(key)), None)):
            raise ValueError(f"`{own}` is of local files; leave it out, a hub data set has its own rows")
        return content
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files) or not isinstance(given, str | None):
        return content  # which is an error of its own
    form = format_of(files, given)
    if content.get("column") and form in ("raw", "lines"):
        raise ValueError(f"`column` is of jsonl and parquet, but {files[0]} is read as {form}; say which `format` it has")
    if content.get("separator") and form != "raw":
        raise ValueError(f"`separator` cuts raw files into rows, but {files[0]} is read as {form}; leave one of them out")
    return content if form == "raw" else {**content, "format": form}


def has_objects(file: str) -> bool:
    """Whether the first lines of a file of plain text are JSON objects, as those of jsonl are."""
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
