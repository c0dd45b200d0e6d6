"""Rows of a classification task: reading, numbering of classes, and the check that train and test share no row."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.data.texts import MOST_SHARED, broken, json_rows, load_hub
from winnow.errors import InputError, first_line
from winnow.io.strict import parse_json

if TYPE_CHECKING:
    import pandas as pd

    from winnow.io import specs
    from winnow.io.records import ExamplesFacts

SPLITS = ("train", "test")


def read_task(spec: specs.Examples) -> tuple[dict[str, pd.DataFrame], ExamplesFacts]:
    """({split: table with columns text, pair (for tasks on pairs), label (number)}, facts) of a resolved task (see
    `winnow.evaluation.kinds.classification`).

    Raises InputError, with the split and the row, for a missing column, a value that is not text, an invalid class (GLUE's own
    `test` has -1), and a train row that is also a test row, unless those are dropped.
    """
    if spec["dataset"]:
        raw, names = _hub_rows(spec["dataset"], spec)
    else:
        raw, names = {"train": _file_rows("train", spec["train"]), "test": _file_rows("test", spec["test"])}, None
    for split, rows in raw.items():
        if not rows:
            raise InputError(f"{split}: there are no rows")
        for column in (*spec["columns"], spec["label"]):
            bad = next((i for i, row in enumerate(rows) if column not in row), None)
            if bad is not None:
                raise InputError(f"{split}, row {bad}: there is no column {column!r}; it has {', '.join(map(str, rows[bad]))}")
    classes = spec["labels"] or names or _classes([row[spec["label"]] for row in raw["train"]])
    tables = {split: _table(split, rows, spec, classes) for split, rows in raw.items()}
    shared = shared_rows(tables["train"], tables["test"])
    if shared and spec["shared_rows"] == "refuse":
        one, other = next(iter(shared.items()))
        text = tables["train"]["text"][one][:60]
        raise InputError(
            f"row {one} of train is also row {other} of test ({text!r}), and {len(shared)} train rows are in test: remove them, "
            "or set `shared_rows: drop` to leave them out of training"
        )
    tables["train"] = tables["train"].drop(index=list(shared)).reset_index(drop=True)
    absent = sorted(set(range(len(classes))) - set(tables["train"]["label"]))
    if len(classes) < 2 or absent:
        raise InputError(f"train has no row of class {classes[absent[0]]!r}" if absent else "train has a single class")
    facts: ExamplesFacts = {
        "labels": classes,
        "rows": {split: len(table) for split, table in tables.items()},
        "dropped": len(shared),
        "digests": {split: hashlib.sha256(table.to_json().encode()).hexdigest() for split, table in tables.items()},
    }
    return tables, facts


def _file_rows(split: str, files: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in map(Path, files):
        try:
            rows += _rows_of(path)
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise InputError(f"{split}: {path}: not readable as {path.suffix[1:]} rows ({first_line(error)})") from error
    return rows


def _rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            table = list(csv.DictReader(stream, strict=True))
            if (long := next((i for i, row in enumerate(table) if None in row), None)) is not None:
                raise ValueError(f"row {long} has more fields than the header; quote texts that contain a comma")
            return table
        content = stream.read()
    if path.suffix == ".jsonl":
        return json_rows(content)
    rows = parse_json(content)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a list of objects is needed")
    return rows


def _hub_rows(dataset: str, spec: specs.Examples) -> tuple[dict[str, list[dict[str, Any]]], list[str] | None]:
    """The rows of both splits, and the names of the classes if the data set has them."""
    found: dict[str, list[dict[str, Any]]] = {}
    names = None
    for split, own in zip(SPLITS, (spec["train_split"], spec["test_split"]), strict=True):
        data = load_hub(dataset, spec["subset"], own, spec["revision"])
        found[split] = data.to_list()
        names = getattr(data.features.get(spec["label"]), "names", None) or names
    return found, names


def _number(value: Any) -> int | None:
    """The number of a class, also from a string, as in csv; None if it is not a number."""
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return int(value) if isinstance(value, int) else None


def _classes(values: list[Any]) -> list[str]:
    """The names of the classes, in the order of their numbers, from the labels of the train rows."""
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) == len(values):
        return [str(number) for number in range(max(known) + 1)]
    return sorted({value for value in values if isinstance(value, str)})


def _table(split: str, rows: list[dict[str, Any]], spec: specs.Examples, classes: list[str]) -> pd.DataFrame:
    names = ("text", "pair")[: len(spec["columns"])]
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "label")}
    for i, row in enumerate(rows):
        for name, column in zip(names, spec["columns"], strict=True):
            if not isinstance(row[column], str) or not row[column].strip():
                raise InputError(f"{split}, row {i}: no text in column {column!r}, but {row[column]!r}")
            if what := broken(row[column]):
                raise InputError(f"{split}, row {i}: column {column!r} contains {what}; fix the text")
            columns[name].append(row[column])
        value = row[spec["label"]]
        number = classes.index(value) if value in classes and not isinstance(value, bool) else _number(value)
        if number is None or not 0 <= number < len(classes):
            hidden = "; GLUE's own `test` has no labels, use its validation rows" if number == -1 else ""
            score = "; fractional labels are a regression task, which is not supported" if isinstance(value, float) else ""
            raise InputError(f"{split}, row {i}: {value!r} is not a class ({', '.join(classes)}){hidden}{score}")
        columns["label"].append(number)
    import pandas as pd  # here, since some callers only read the table

    return pd.DataFrame(columns)


def _keys(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """A key per row by which equal rows are found: its words without regard to case and whitespace, pairs in either order."""
    texts = [table[name] for name in ("text", "pair") if name in table]
    return [tuple(sorted(" ".join(text.lower().split()) for text in row)) for row in zip(*texts, strict=True)]


def shared_rows(train: pd.DataFrame, test: pd.DataFrame) -> dict[int, int]:
    """{train row: test row with the same texts}"""
    places = {key: i for i, key in enumerate(_keys(test))}
    return {i: places[key] for i, key in enumerate(_keys(train)) if key in places}


def check_rows(calibration: list[str], test: pd.DataFrame, names: tuple[str, str]) -> dict[str, int]:
    """Counts the test rows with a text that is a row of the calibration text; the check of `winnow.data.texts` misses short rows
    in another order. Raises InputError, with the row, if their share exceeds `MOST_SHARED`."""
    known = {" ".join(text.lower().split()) for text in calibration}
    found = [i for i, key in enumerate(_keys(test)) if known & set(key)]
    if len(found) > MOST_SHARED * len(test):
        raise InputError(
            f"calibration text {names[0]} contains row {found[0]} of the test rows {names[1]}, and {len(found)} of {len(test)} "
            f"in total (allowed: {MOST_SHARED:.0%}); calibrate on the train rows: `task` instead of `text`"
        )
    return {"test_rows": len(test), "common_rows": len(found)}


def texts_of(table: pd.DataFrame) -> list[str]:
    """All texts of a table of rows (from `read_task` or a text), row by row."""
    columns = [table[name] for name in ("text", "pair") if name in table]
    return [text for row in zip(*columns, strict=True) for text in row]
