"""Texts: rows read from files or a hub data set, and the check that calibration and evaluation texts do not overlap."""

from __future__ import annotations

import hashlib
from os.path import isfile  # unlike Path's, it accepts invalid names
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.errors import InputError, first_line
from winnow.io.strict import parse_json

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.io.records import Overlap

SHINGLE = 24  # words: long enough that documents have a common run only if they have text in common
MOST_SHARED = 0.01


def read_rows(spec: specs.Text) -> list[str]:
    """The rows of a text preset (see `winnow.planning.config.Text`), from `start` to `stop`. Raises InputError if there are
    none."""
    if spec["dataset"]:
        rows = _hub_rows(spec["dataset"], spec)
    else:
        rows = [row for file in spec["files"] for row in _file_rows(Path(file), spec)]
    chosen = rows[spec["start"] : spec["stop"]]
    for number, row in enumerate(chosen, spec["start"]):
        where = spec["dataset"] or ", ".join(spec["files"])
        if not isinstance(row, str):
            raise InputError(f"{where}: row {number} has {type(row).__name__}, not text, in column {spec['column']!r}")
        if what := broken(row):
            raise InputError(f"{where}: row {number} contains {what}; fix the text in column {spec['column']!r}")
    if not any(row.strip() for row in chosen):
        where = spec["dataset"] or ", ".join(spec["files"])
        raise InputError(f"{where}: no text in rows {spec['start']} to {spec['stop'] or len(rows)} (it has {len(rows)} rows)")
    return chosen


def _file_rows(path: Path, spec: specs.Text) -> list[str]:
    if not isfile(path):
        raise InputError(f"{path}: there is no such text file; check `files` of the text")
    form, column = spec["format"], spec["column"]
    try:
        if form == "parquet":
            return _parquet_rows(path, column)
        with open(path, encoding="utf-8", newline="") as stream:  # newline="": only line feeds end a line
            content = stream.read()
        if form == "jsonl":
            return [row[column] for row in json_rows(content, column)]
        if form == "lines":
            lines = [line + "\n" for line in content.split("\n")]
            lines[-1] = lines[-1][:-1]
            return ["" if not line.strip() else line for line in (lines if lines[-1] else lines[:-1])]
        return content.split(spec["separator"]) if spec["separator"] else [content]
    except (OSError, ValueError) as error:
        what = f"{form} with column {column!r}" if form in ("jsonl", "parquet") else form
        raise InputError(f"{path}: not readable as {what} ({first_line(error)})") from error


def _parquet_rows(path: Path, column: str) -> list[Any]:
    import pyarrow.parquet as pq

    if column not in (names := pq.read_schema(path).names):
        raise ValueError(f"there is no column {column!r}; it has {', '.join(names)}")
    return pq.read_table(path, columns=[column])[column].to_pylist()


def json_rows(content: str, *columns: str) -> list[dict[str, Any]]:
    """The objects of JSON Lines. Raises ValueError, with the line, if it is not an object, has a duplicate key or lacks a
    column."""
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: an object is needed, not {type(row).__name__}")
        if absent := [column for column in columns if column not in row]:
            raise ValueError(f"line {number}: there is no column {absent[0]!r}; it has {', '.join(row) or 'none'}")
        rows.append(row)
    return rows


def broken(text: str) -> str | None:
    """A description of the first lone surrogate in a text, which JSON can contain but UTF-8 cannot; None without one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}, a lone surrogate, which is not a character"
    return None


def _hub_rows(dataset: str, spec: specs.Text) -> list[str]:
    data = load_hub(dataset, spec["subset"], spec["split"], spec["revision"])
    if spec["column"] not in data.column_names:
        raise InputError(f"{dataset}: no column {spec['column']!r}; it has {', '.join(data.column_names)}")
    return list(data[spec["column"]])


def load_hub(dataset: str, subset: str | None, split: str, revision: str) -> Any:
    """A split of a hub data set. Raises InputError if it is not cached and cannot be downloaded, or cannot be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(dataset, subset, split=split, revision=revision)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{dataset}, {split}: not cached, and cannot be downloaded ({first_line(error)}); "
            "run `snakemake prefetch` with a network connection"
        ) from error
    except DatasetsError as error:
        while error.__cause__ is not None:  # `datasets` wraps the informative error
            error = error.__cause__
        raise InputError(f"{dataset}, {split}: not readable ({first_line(error)})") from error


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shingles(rows: list[str]) -> np.ndarray:
    """Sorted distinct digests (uint64) of all runs of `SHINGLE` words; one digest for a shorter text."""
    words = " ".join(rows).split()
    codes = np.array([int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest()) for w in words], dtype=np.uint64)
    width = min(SHINGLE, len(codes))
    total = np.zeros(len(codes) - width + 1, dtype=np.uint64)
    for offset in range(width):  # polynomial hash modulo 2**64
        total = total * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(total)]
    return np.unique(total)


def check_overlap(calibration: list[str], evaluation: list[str], names: tuple[str, str]) -> Overlap:
    """How much of each text is contained in the other, as shares of runs of words.

    Raises InputError if either share exceeds `MOST_SHARED`: results on the calibration text would be meaningless.
    """
    a, b = shingles(calibration), shingles(evaluation)
    common = len(np.intersect1d(a, b, assume_unique=True))
    shares = {"of_calibration": common / len(a), "of_evaluation": common / len(b)}
    if max(shares.values()) > MOST_SHARED:
        raise InputError(
            f"calibration text {names[0]} and evaluation text {names[1]} overlap: {shares['of_calibration']:.1%} of the "
            f"calibration text's and {shares['of_evaluation']:.1%} of the evaluation text's runs of {SHINGLE} words are in the "
            f"other (allowed: {MOST_SHARED:.0%}); calibrate on a text that is not evaluated"
        )
    return {
        "words_per_run": SHINGLE,
        "common_runs": common,
        "of_calibration": shares["of_calibration"],
        "of_evaluation": shares["of_evaluation"],
        "allowed": MOST_SHARED,
    }
