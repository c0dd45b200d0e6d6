"""Removes local paths from files that are shared: they are useless elsewhere and reveal where somebody works."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from winnow.errors import InputError, first_line

CONFIGS = "*config.json"  # of a model, its tokenizer and its generation: transformers writes local paths into them
REPORTS = ("recipe.yaml", "recovery.json", "optimisation.json")


def is_local(value: Any) -> bool:
    """Whether a value is an absolute path of any operating system, or a path below a home directory."""
    if not isinstance(value, str) or "\n" in value:
        return False
    path = PureWindowsPath(value)  # knows both kinds of slashes
    return (value.startswith(("/", "~")) or bool(path.drive)) and len(path.parts) > 2


def named(content: Any) -> Any:
    """The content with every local path replaced by its last component, the name of the model or text."""
    if isinstance(content, dict):
        return {key: named(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [named(value) for value in content]
    return PureWindowsPath(content).name if is_local(content) else content


def without_local(config: dict[str, Any]) -> dict[str, Any]:
    """A config without entries that are local paths, such as `_name_or_path`, which no loader can use elsewhere."""
    kept = {key: value for key, value in config.items() if not is_local(value)}
    return {key: without_local(value) if isinstance(value, dict) else value for key, value in kept.items()}


def copy_config(source: Path, target: Path) -> None:
    """Copy a config without its local paths, byte by byte if it has none. Raises InputError if it is not a JSON object."""
    content = source.read_bytes()
    try:
        config = json.loads(content)
        cleaned = without_local(config)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{source}: not a JSON object ({first_line(error)})") from error
    if cleaned != config:
        content = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    target.write_bytes(content)


def clean(directory: Path) -> None:
    """Remove local paths from the configs and reports of a checkpoint."""
    for path in sorted(directory.glob(CONFIGS)):
        copy_config(path, path)
    for path in (directory / name for name in REPORTS):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
            if named(content) != content:
                dumped = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
                options: dict[str, Any] = {"sort_keys": False} if path.suffix == ".yaml" else {"indent": 1}
                path.write_text(dumped(named(content), **options).rstrip() + "\n", encoding="utf-8")
