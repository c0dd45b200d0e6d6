"""What a result was made from: fingerprints of the project's code, library versions, digests.

Snakemake sees neither edits in imported modules nor upgraded libraries; the rules therefore hand both over as params.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from winnow.errors import InputError, absent
from winnow.io.artifacts import write_note

PACKAGE = "winnow"
DIGITS = 10
MEMORY = Path(".snakemake/winnow-code")  # in the folder of a run: what files of code came to


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _without_type_imports(tree: ast.Module) -> ast.Module:
    """Without `if TYPE_CHECKING:` blocks, which never run."""
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING" and not n.orelse)]
    return tree


def parse(source: bytes, file: str, module: str) -> tuple[str, frozenset[str]]:
    """(digest of the code without comments and docstrings, project modules that it imports) of a file's bytes."""
    tree = _without_type_imports(ast.parse(source))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                keep = len(module.split(".")) - node.level + (file == "__init__.py")
                base = ".".join([*module.split(".")[:keep], *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    digest = hashlib.sha256(ast.unparse(_without_docstrings(tree)).encode()).hexdigest()[:DIGITS]
    return digest, frozenset(name for name in found if name.split(".")[0] == PACKAGE)


@cache
def _own_source() -> bytes:
    return Path(__file__).read_bytes()


def remembered(source: bytes, file: str, module: str, memory: Path | None) -> tuple[str, frozenset[str]]:
    """As `parse`, which takes most of the time of a fingerprint: what it came to is kept in the folder `memory`, a small file for
    each content."""
    if memory is None:
        return parse(source, file, module)
    key = hashlib.sha256(repr((source, file, module, sys.version, _own_source())).encode()).hexdigest()
    entry = memory / f"{key}.json"
    if entry.is_file():
        digest, names = json.loads(entry.read_text(encoding="utf-8"))
        return digest, frozenset(names)
    digest, found = parse(source, file, module)
    write_note(entry, json.dumps([digest, sorted(found)]))
    return digest, found


class CodeTracker:
    """Fingerprints of the scripts below `root`/scripts and of the package modules they reach by import statements.

    What a file's bytes come to is kept in the folder `memory`, one small file each, since parsing takes most of the time.
    """

    def __init__(self, root: Path, memory: Path | None = None):
        self.root = Path(root)
        self.memory = memory

    @cached_property
    def _files(self) -> dict[str, Path]:
        """{module: its file}; listed once, since most names that are looked up are imported from modules and are none."""
        found = {}
        for folder, _, names in os.walk(self.root / "src" / PACKAGE):
            package = ".".join(Path(folder).relative_to(self.root / "src").parts)
            for name in (name for name in names if name.endswith(".py")):
                found[package if name == "__init__.py" else f"{package}.{name[:-3]}"] = Path(folder, name)
        return found

    @cache  # noqa: B019 - one tracker lives as long as the process
    def _parse(self, path: Path, module: str) -> tuple[str, frozenset[str]]:
        return remembered(path.read_bytes(), path.name, module, self.memory)

    @cache  # noqa: B019
    def fingerprint(self, *entries: str) -> tuple[str, ...]:
        """Sorted `name digest` lines of the entries and all that they reach.

        An entry is a script name ending in .py, or a module.
        Raises InputError for an entry, or for a module named by an import statement, that does not exist: what cannot be found
        cannot be tracked.
        """
        todo, lines, asked = list(entries), {}, frozenset(entries)
        while todo:
            name = todo.pop()
            if name in lines:
                continue
            if name.endswith(".py"):
                path: Path | None = self.root / "scripts" / name
                module = ""
            else:
                path, module = self._files.get(name), name
                parent = name.rpartition(".")[0]
                todo += [parent] if parent else []  # importing a module runs the packages above it
                if path is None and (name in asked or parent not in self._files):
                    raise InputError(f"{self.root / 'src'}: there is no module {name}, so its code cannot be tracked")
            if path is None:  # a name imported from a module, not a module
                continue
            if not path.is_file():
                raise InputError(f"{path}: there is no such script, so its code cannot be tracked")
            digest, imported = self._parse(path, module)
            lines[name] = digest
            todo += sorted(imported)
        return tuple(f"{name} {digest}" for name, digest in sorted(lines.items()))


@cache
def versions(*packages: str) -> dict[str, str]:
    """{package: installed version}, read from the packages' metadata without importing them. Raises InputError for one that is
    not installed."""
    return {name: _version(name) for name in sorted(packages)}


@cache
def _version(package: str) -> str:
    """As `importlib.metadata.version`, which parses all of the metadata, the package's description included."""
    try:
        metadata = distribution(package).read_text("METADATA") or ""
    except PackageNotFoundError:
        raise InputError(absent(package)) from None
    found = re.search(r"^Version: (\S+)$", metadata, flags=re.MULTILINE)
    return found[1] if found else version(package)
