"""The local files that a preset of lm-eval tasks reads: definitions, their code, and their data."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from os.path import isdir, isfile  # unlike Path's, they accept invalid names
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from winnow.errors import InputError, first_line
from winnow.io.strict import read_yaml

if TYPE_CHECKING:
    from winnow.evaluation.kinds.accuracy import Accuracy


class _Loader(yaml.SafeLoader):
    """Reads `!function module.name` as a string; lm-eval imports the function, a plan does not."""


_Loader.add_constructor("!function", lambda _, node: f"!function {node.value}")


def is_file(task: str) -> bool:
    """Whether an entry of `tasks` is the path of a definition rather than the name of a task."""
    return task.endswith((".yaml", ".yml"))


def is_group(path: Path) -> bool:
    """Whether a definition describes a group of tasks."""
    content = _read(path)
    return isinstance(content, dict) and "group" in content


def _read(path: Path) -> Any:
    """A task definition. Raises InputError, with the line, if it is invalid or has a duplicate key."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"), str(path), _Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a task definition: {first_line(error)}") from error


def files_of(name: str, preset: Accuracy.Options) -> list[str]:
    """All local files that the preset `name` reads, each once.

    These are the `files`, every file below `include_path`, the definitions among `tasks` with their includes and the code that
    they name, and the local `data_files` of all these definitions. Raises InputError for a missing file.
    """
    found: dict[str, None] = {}
    for splits in preset.files.values():
        for paths in splits.values():
            found.update(dict.fromkeys(paths))
    definitions = [Path(task) for task in preset.tasks if is_file(task)]
    if preset.include_path:
        folder = Path(preset.include_path)
        if not isdir(folder):
            raise InputError(f"evaluations.{name}.include_path: {folder}: there is no such folder")
        inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _hidden(p.relative_to(folder))]
        found.update(dict.fromkeys(map(str, inside)))
        definitions += [p for p in inside if is_file(p.name)]
    for path in definitions:
        found.update(dict.fromkeys(_of_definition(name, path)))
    for file in found:
        if not isfile(file):
            raise InputError(f"evaluations.{name}: {file}: there is no such file")
    return list(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _of_definition(name: str, path: Path, includes: tuple[Path, ...] = ()) -> Iterator[str]:
    yield str(path)
    if path.resolve() in includes:
        raise InputError(f"evaluations.{name}: {path}: includes itself")
    if not isfile(path):
        raise InputError(f"evaluations.{name}: {path}: there is no such file")
    content = _read(path)
    for value in _texts(content):
        module = value.removeprefix("!function ").rpartition(".")[0]
        code = path.parent / f"{module.replace('.', '/')}.py"
        if value.startswith("!function ") and code.is_file():
            yield str(code)
    if not isinstance(content, dict):
        return
    included = content.get("include", [])
    for other in [included] if isinstance(included, str) else included:
        yield from _of_definition(name, path.parent / other, (*includes, path.resolve()))
    for pattern in _texts((content.get("dataset_kwargs") or {}).get("data_files")):
        yield from sorted(glob.glob(pattern, recursive=True))  # a name on the hub matches nothing


def _texts(content: Any) -> Iterator[str]:
    """All strings in nested lists and maps."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)
