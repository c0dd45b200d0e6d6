"""What a mistake in the configuration is called: its file, its key, and the nearest one that there is."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel

from winnow.evaluations import PLAIN
from winnow.fields import EACH, ONE
from winnow.structures import AnyStructure


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def as_written(path: list[str], config: Any) -> list[str]:
    """The location without the union tags that pydantic puts into it."""
    keys = []
    for part in path:
        if isinstance(config, dict) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdigit():
            config = config[int(part)]
        elif part in (ONE, EACH) or (isinstance(config, dict) and config.get("kind", PLAIN) == part):
            continue
        keys.append(part)
    return keys


def keys_at(path: list[str], annotation: Any) -> list[str]:
    """Valid keys of the preset or section found at `path` in a model; a path holds names of presets and tags of unions too."""
    for part in path:
        if typing.get_origin(annotation) is dict:  # `part` is the name of a preset
            annotation = typing.get_args(annotation)[1]
            continue
        models = _models(annotation)
        tagged = [model for model in models if _kind(model) == part]
        annotation = tagged[0] if tagged else models[0].model_fields[part].annotation
    return list(_models(annotation)[0].model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models of an annotation: itself, or those of a union."""
    if isinstance(annotation, typing.ForwardRef):
        annotation = AnyStructure
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    arguments = typing.get_args(annotation)
    parts = arguments[:1] if typing.get_origin(annotation) is Annotated else arguments
    return [model for part in parts for model in _models(part)]


def _kind(model: type[BaseModel]) -> str | None:
    """The one value that a model's `kind` can have."""
    return typing.get_args(model.model_fields["kind"].annotation)[0] if "kind" in model.model_fields else None


def file_of(keys: list[str], files: typing.Sequence[str | Path]) -> str:
    """The last configuration file that holds the key, or the longest beginning of it."""
    best, depth = "", 0
    for file in files:
        content, found = yaml.safe_load(Path(file).read_text(encoding="utf-8")), 0
        for key in keys:
            if not isinstance(content, dict) or key not in content:
                break
            content, found = content[key], found + 1
        if found >= max(depth, 1):
            best, depth = str(file), found
    return best or (str(files[-1]) if files else "")
