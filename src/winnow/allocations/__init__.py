"""The registry of allocations: every module of this package that defines an `Allocation` is one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from winnow.allocations.base import Allocation, AllocationOptions


def _scan() -> dict[str, type[Allocation]]:
    found: dict[str, type[Allocation]] = {}
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Allocation) and not inspect.isabstract(cls):
                if cls.__module__ != module.__name__:
                    continue  # a file may start from another one's allocation
                if cls.kind() != entry.name:
                    raise TypeError(f"{module.__name__}: an allocation's kind is the name of its file, not {cls.kind()!r}")
                found[cls.kind()] = cls
    return found


ALLOCATIONS = _scan()
if TYPE_CHECKING:
    AnyAllocation = AllocationOptions
else:
    AnyAllocation = Annotated[reduce(or_, (cls.Options for cls in ALLOCATIONS.values())), Field(discriminator="kind")]


def allocation_of(spec: dict[str, Any]) -> Allocation:
    """The allocation that a resolved specification ({kind, ...}) describes."""
    cls = ALLOCATIONS[spec["kind"]]
    return cls(cls.Options.model_validate(spec))
