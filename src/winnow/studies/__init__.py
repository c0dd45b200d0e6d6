"""Studies: the experiments of one paper each. A folder of this package is one: its `study` defines `STUDY`, and beside it
stands what no other study needs."""

from __future__ import annotations

import importlib
import pkgutil

from winnow.studies.base import NONE, Study, key_of

__all__ = ["NONE", "key_of", "names", "study_of"]


def names() -> list[str]:
    """Names of all studies, without importing them."""
    return [entry.name for entry in pkgutil.iter_modules(__path__) if entry.ispkg]


def study_of(name: str) -> Study:
    """The study of a name; its folder alone is imported, so that no study depends on another's code."""
    return importlib.import_module(f"{__name__}.{name}").STUDY
