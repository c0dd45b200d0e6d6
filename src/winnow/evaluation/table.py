"""The table of a kind of evaluation, by the function that the kind names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def tabulated(table: str, rows: list[dict[str, Any]], results: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The table of a kind (its `table`): `rows` name its cells, `results` are what was measured, by `row["result"]`."""
    module, function = table.split(":")
    return getattr(import_module(module), function)(rows, results)
