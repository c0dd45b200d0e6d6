"""The registry of structures: every module of this package that defines a `Structure` is one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.structures.base import Structure, StructureOptions


def _scan() -> dict[str, type[Structure]]:
    found: dict[str, type[Structure]] = {}
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Structure) and not inspect.isabstract(cls):
                if cls.__module__ != module.__name__:
                    continue
                if cls.kind() != entry.name:
                    raise TypeError(f"{module.__name__}: a structure's kind is the name of its file, not {cls.kind()!r}")
                found[cls.kind()] = cls
    return found


STRUCTURES = _scan()
if TYPE_CHECKING:
    AnyStructure = StructureOptions
else:
    AnyStructure = Annotated[reduce(or_, (cls.Options for cls in STRUCTURES.values())), Field(discriminator="kind")]
    for cls in STRUCTURES.values():  # structures that hold another structure name it by a forward reference
        cls.Options.model_rebuild(_types_namespace={"AnyStructure": AnyStructure})


def structure_of(spec: dict) -> Structure:
    """The structure that a resolved specification ({kind, ...}) describes."""
    cls = STRUCTURES[spec["kind"]]
    return cls(cls.Options.model_validate(spec))
