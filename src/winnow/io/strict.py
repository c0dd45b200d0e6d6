"""YAML and JSON without duplicate keys: the usual readers silently take the last one."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import yaml

from winnow.errors import InputError, first_line

STRING, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
READ_AS = {"int": "a number", "float": "a number", "bool": "true or false", "null": "nothing", "timestamp": "a date"}
DEEP = "nested too deep to be read"


def read_yaml(text: str, where: str, loader: type = yaml.SafeLoader, names: bool = False) -> Any:
    """The content of a YAML document. With `names`, keys must be strings: unquoted, `2024`, `0.8` and `no` are not.

    Raises InputError with `where`, the line and the key for a duplicate key or one that is not a string, and for invalid YAML.
    """
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        _check_keys(node, [], set(), where, names)
        return reader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    except RecursionError as error:
        raise InputError(f"{where}: {DEEP}") from error


def check_yaml(text: str, where: str) -> None:
    """Raise InputError for a duplicate key; invalid YAML is left to its reader."""
    with suppress(yaml.YAMLError, RecursionError):
        if node := yaml.SafeLoader(text).get_single_node():
            _check_keys(node, [], set(), where, names=False)


def _check_keys(node: yaml.Node, path: list[str], seen: set[int], where: str, names: bool) -> None:
    """Check the keys of a node and of all nodes below it, before merges (`<<`) add the keys of others."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, part in enumerate(node.value):
            _check_keys(part, [*path, str(number)], seen, where, names)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line, inner = key.start_mark.line + 1, [*path, str(key.value)]
        if names and key.tag not in (STRING, MERGE):
            kind = READ_AS.get(key.tag.rpartition(":")[2], "something else")
            raise InputError(f'{where}, line {line}: {".".join(inner)}: YAML reads this name as {kind}; quote it: "{key.value}"')
        if (own := (key.tag, str(key.value))) in lines:
            raise InputError(f"{where}, line {line}: {'.'.join(inner)} is already given in line {lines[own]}; keep one of them")
        lines[own] = line
        _check_keys(value, inner, seen, where, names)


def parse_json(text: str) -> Any:
    """The content of a JSON document. Raises ValueError if it is invalid, and InputError (a ValueError) for a duplicate key and
    for nesting that is too deep."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise InputError(DEEP) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"duplicate key {twice!r} in an object")
    return found
