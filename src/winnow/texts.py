"""Texts: rows read from files or a hub data set, and the guard that keeps calibration out of evaluation text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from winnow.errors import InputError, first_line

SHINGLE = 24  # words: long enough that two documents share one only where they share text
MOST_SHARED = 0.01


def read_rows(spec: dict[str, Any]) -> list[str]:
    """The rows of a text preset (see `winnow.config.Text`), from `start` to `stop`. Raises InputError if there are none."""
    if spec["dataset"]:
        rows = _hub_rows(spec)
    else:
        rows = [row for file in spec["files"] for row in _file_rows(Path(file), spec)]
    chosen = rows[spec["start"] : spec["stop"]]
    for number, row in enumerate(chosen, spec["start"]):
        if not isinstance(row, str):
            where = spec["dataset"] or ", ".join(spec["files"])
            raise InputError(f"{where}: row {number} holds {type(row).__name__}, not text, in column {spec['column']!r}")
    if not any(row.strip() for row in chosen):
        where = spec["dataset"] or ", ".join(spec["files"])
        raise InputError(f"{where}: no text in rows {spec['start']} to {spec['stop'] or len(rows)} (it has {len(rows)} rows)")
    return chosen


def _file_rows(path: Path, spec: dict[str, Any]) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such text file; check `files` of the text")
    try:
        if spec["format"] == "parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path, columns=[spec["column"]])[spec["column"]].to_pylist()
        with open(path, encoding="utf-8", newline="") as stream:  # as it is: a line ends at a line feed and nowhere else
            content = stream.read()
        if spec["format"] == "jsonl":
            return [json.loads(line)[spec["column"]] for line in content.split("\n") if line.strip()]
        if spec["format"] == "lines":
            lines = [line + "\n" for line in content.split("\n")]
            lines[-1] = lines[-1][:-1]
            return ["" if not line.strip() else line for line in (lines if lines[-1] else lines[:-1])]
        return content.split(spec["separator"]) if spec["separator"] else [content]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{spec['format']} with column {spec['column']!r}" if spec["format"] in ("jsonl", "parquet") else spec["format"]
        raise InputError(f"{path}: not readable as {what} ({first_line(error)})") from error


def _hub_rows(spec: dict[str, Any]) -> list[str]:
    from datasets import load_dataset

    try:
        data = load_dataset(spec["dataset"], spec["subset"], split=spec["split"], revision=spec["revision"])
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{spec['dataset']}: neither cached nor to be downloaded ({first_line(error)}); "
            "run `snakemake prefetch` where there is a network"
        ) from error
    if spec["column"] not in data.column_names:
        raise InputError(f"{spec['dataset']}: no column {spec['column']!r}; it has {', '.join(data.column_names)}")
    return list(data[spec["column"]])


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shingles(rows: list[str]) -> np.ndarray:
    """Sorted distinct digests (uint64) of all runs of `SHINGLE` words; a shorter text gives one digest of all it has."""
    words = " ".join(rows).split()
    codes = np.array([int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest()) for w in words], dtype=np.uint64)
    width = min(SHINGLE, len(codes))
    total = np.zeros(len(codes) - width + 1, dtype=np.uint64)
    for offset in range(width):  # polynomial hash modulo 2**64
        total = total * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(total)]
    return np.unique(total)


def check_overlap(calibration: list[str], evaluation: list[str], names: tuple[str, str]) -> dict[str, Any]:
    """How much of each text stands in the other, as shares of runs of words.

    Raises InputError if either share exceeds `MOST_SHARED`: numbers measured on calibration text mean nothing.
    """
    a, b = shingles(calibration), shingles(evaluation)
    common = len(np.intersect1d(a, b, assume_unique=True))
    shares = {"of_calibration": common / len(a), "of_evaluation": common / len(b)}
    if max(shares.values()) > MOST_SHARED:
        raise InputError(
            f"calibration text {names[0]} and evaluation text {names[1]} overlap: {shares['of_calibration']:.1%} of the "
            f"calibration text's and {shares['of_evaluation']:.1%} of the evaluation text's runs of {SHINGLE} words stand in "
            f"the other (allowed: {MOST_SHARED:.0%}); calibrate on a text that is not evaluated"
        )
    return {"words_per_run": SHINGLE, "common_runs": common, **shares, "allowed": MOST_SHARED}
