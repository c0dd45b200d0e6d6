"""Kinds of recovery, a module each: `recover(task)` changes the model of the task in place and returns a report."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.recovery.base import Task


def recovery_of(kind: str) -> Callable[[Task], dict[str, Any]]:
    """The function of a kind. Imported by its name, so that a result depends on its own kind's code only."""
    return importlib.import_module(f"{__name__}.{kind}").recover
