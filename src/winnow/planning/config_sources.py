"""The sources of a configuration: strictly read files and command-line arguments; and which of them caused an error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.errors import InputError, first_line
from winnow.io.strict import check_yaml, parse_json, read_yaml

ARGUMENTS = ("--config", "-C")
Place = Sequence[str]  # a path of keys


@dataclass(frozen=True)
class Source:
    """Presets from one source; `own`: the workflow's own file, which is complete and valid by itself."""

    name: str
    content: dict[str, Any]
    own: bool = False


def read_source(path: str | Path, own: bool = False) -> Source:
    """A configuration file, JSON or YAML. Raises InputError, with the line, for a duplicate key and for a name that YAML does not
    read as a string; and if the file cannot be read or has no sections."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable: {getattr(error, 'strerror', None) or first_line(error)}") from error
    try:
        content = parse_json(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except ValueError:
        content = read_yaml(text, str(path), names=True)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a mapping of sections, see config/README.md")
    return Source(str(path), content, own)


def sources(
    own: Iterable[str | Path],
    given: Iterable[str | Path],
    config: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> list[Source]:
    """The workflow's own files, those of --configfile, and `config` from --config; later ones take precedence. `arguments`: the
    command line, with the text from which `config` was read. Raises InputError as `read_source`."""
    files = [read_source(path, own=True) for path in own] + [read_source(path) for path in given]
    check_arguments(arguments)
    return [*files, Source(ARGUMENTS[0], dict(config))] if config else files


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise InputError for a duplicate key in --config."""
    given: set[str] = set()
    listed = False
    for argument in arguments:
        flag, assigned, first = argument.partition("=")
        if argument.startswith("-"):
            listed = flag in ARGUMENTS
            argument = first if listed and assigned else ""
        if not listed or not argument:
            continue
        key, _, value = argument.partition("=")
        if key in given:
            raise InputError(f"--config: duplicate key {key}; keep one of them")
        given.add(key)
        check_yaml(value, f"--config {key}")


def merged(parts: Iterable[Source]) -> dict[str, Any]:
    """The configuration as Snakemake merges it: key by key, later sources take precedence."""
    found: dict[str, Any] = {}
    for part in parts:
        _merge(found, part.content)
    return found


def anchored(config: dict[str, Any], parts: Iterable[Source], root: Path) -> dict[str, Any]:
    """The configuration with relative paths of the workflow's own files as paths below `root`, the checkout, if a run works in
    another folder. Paths that the user gave are relative to the folder of the run."""
    if Path.cwd() == root:
        return config
    found = copy.deepcopy(config)
    for own in (part.content for part in parts if part.own):
        for section, key in (("models", "source"), ("texts", "files")):
            for name, preset in own.get(section, {}).items():
                place = found.get(section, {}).get(name)
                if isinstance(place, dict) and key in preset and place.get(key) == preset[key] and "revision" not in place:
                    given = place[key]
                    place[key] = [str(root / path) for path in given] if isinstance(given, list) else str(root / given)
    return found


def _merge(into: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    for key, value in other.items():
        if isinstance(value, dict):
            below = into.get(key)
            into[key] = _merge(below if isinstance(below, dict) else {}, value)
        else:
            into[key] = value
    return into


def source_of(places: Iterable[Place], parts: Sequence[Source]) -> str:
    """The name of the source of an error at `places`. Among sources with one of these presets, a user's comes before the
    workflow's own, which has no errors by itself; then the one with most of the keys; then the last."""

    def holds(part: Source, place: Place) -> tuple[bool, bool, int]:
        content, depth = part.content, 0
        for key in place:
            if not isinstance(content, dict) or key not in content:
                break
            content, depth = content[key], depth + 1
        return depth >= min(len(place), 2), not part.own, depth

    ranked = [(holds(part, place), number) for place in places for number, part in enumerate(parts)]
    ((found, _, _), number) = max(ranked, default=((False, False, 0), -1))
    if not found:
        number = max((n for n, part in enumerate(parts) if not part.own), default=len(parts) - 1)
    return parts[number].name if parts else ""
