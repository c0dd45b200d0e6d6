"""The table of a kind of evaluation, by the function named in the kind."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from winnow.io.records import Row

if TYPE_CHECKING:
    import pandas as pd


def tabulated(table: str, rows: list[Row], results: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The table of a kind, by its function `table`: `rows` are the cells, `results` the measurements by `row["result"]`."""
    module, function = table.split(":")
    return getattr(import_module(module), function)(rows, results)
