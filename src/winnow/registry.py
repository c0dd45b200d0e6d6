"""Plug-ins: the kinds of metrics, structures, allocations, recoveries, evaluations and studies.

A kind is a file of its package, and is registered by being in the folder: the file `energy.py` defines one class, a subclass of
the package's base, whose options have `kind: Literal["energy"]`. Options are read when a workflow is planned, so such a file
imports torch inside functions only.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC
from collections.abc import Iterator, Mapping
from functools import cached_property, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args

from pydantic import Field

from winnow.options import Strict


class Options(Strict):
    """The options of a preset of one kind."""

    kind: str


class Plugin(ABC):
    """One kind, with the options of a preset."""

    version: ClassVar[int] = 1  # raised when the same options give other numbers
    reference: ClassVar[str]  # the paper or code that it follows
    Options: ClassVar[type[Any]]

    def __init__(self, options: Any):
        self.options = options

    @classmethod
    def kind(cls) -> str:
        return get_args(cls.Options.model_fields["kind"].annotation)[0]


P = TypeVar("P", bound=Plugin)


class Registry(Mapping[str, type[P]], Generic[P]):
    """{kind: class} of the plug-ins below a package, in the order of their names; a module is imported when it is asked for.

    `nested`: the name by which options of these plug-ins refer to the union of all of them, where a plug-in can hold others.
    `inside`: where every plug-in is a folder, the module in it that defines the class.
    """

    def __init__(self, package: str, base: type[P], nested: str | None = None, inside: str | None = None):
        self.package, self.base, self.nested, self.inside = package, base, nested, inside

    @cached_property
    def _modules(self) -> list[str]:
        """Names of all modules right below the package, some of which may help plug-ins and define none; or of all folders."""
        entries = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return sorted(entry.name for entry in entries if entry.ispkg or not self.inside)

    def _class(self, kind: str) -> type[P] | None:
        module = importlib.import_module(self.module(kind))
        for cls in vars(module).values():
            own = inspect.isclass(cls) and issubclass(cls, self.base) and cls.__module__ == module.__name__
            if own and cls is not self.base and not inspect.isabstract(cls):
                if cls.kind() != kind:
                    raise TypeError(f"{module.__name__}: the kind of a plug-in is the name of its file, not {cls.kind()!r}")
                return cls
        return None

    @cached_property
    def _found(self) -> dict[str, type[P]]:
        classes = {kind: self._class(kind) for kind in self._modules}
        return {kind: cls for kind, cls in classes.items() if cls is not None}

    @cached_property
    def union(self) -> Any:
        """The type of a preset of any kind, for fields of the configuration."""
        found: Any = Annotated[reduce(or_, (cls.Options for cls in self._found.values())), Field(discriminator="kind")]
        if self.nested:
            for cls in self._found.values():
                cls.Options.model_rebuild(_types_namespace={self.nested: found})
        return found

    def __getitem__(self, kind: str) -> type[P]:
        found = self._class(kind) if self.inside and kind in self._modules else self._found.get(kind)
        if found is None:
            raise KeyError(kind)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules if self.inside else self._found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def module(self, kind: str) -> str:
        """The module that defines a kind, for fingerprints."""
        return ".".join([self.package, kind, *([self.inside] if self.inside else [])])

    def build(self, spec: Mapping[str, Any]) -> P:
        """The plug-in that a resolved preset ({kind, ...}) describes. Raises KeyError for an unknown kind."""
        if self.nested:
            assert self.union is not None  # options that hold others are complete from here on
        cls = self[spec["kind"]]
        return cls(cls.Options.model_validate(spec))
