"""Error messages for mistakes in the configuration: with file, key, and the nearest valid key."""

from __future__ import annotations

import difflib
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from winnow.evaluation.base import PLAIN
from winnow.options import LONGEST
from winnow.planning.ranks import EACH, ONE
from winnow.structures.base import STRUCTURES

KEY = "[key]"  # pydantic's marker of an error about a key rather than its value


class Located(ValueError):
    """A mistake that involves several presets: the message for `place`, and all presets involved."""

    def __init__(self, place: tuple[str, ...], message: str, *others: tuple[str, str]):
        super().__init__(message)
        self.places = [place, *others]


def described(error: ValidationError, config: dict[str, Any], model: Any) -> tuple[list[list[str]], str]:
    """(places, message) of the first mistake in a configuration: the key path, then those of other presets involved; and what is
    wrong, with the nearest valid name."""
    errors = error.errors()  # a key with a typo is also missing under its right name
    detail = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = [str(part) for part in detail["loc"]]
    message, context, given = detail["msg"].removeprefix("Value error, "), detail.get("ctx", {}), detail["input"]
    if path[-1:] == [KEY]:
        path, message = path[:-1], _of_name(detail["type"], given) or message
    elif detail["type"] == "extra_forbidden":
        message = f"unknown key{nearest(path[-1], keys_at(path[:-1], model))}"
    elif detail["type"] == "union_tag_invalid":
        valid = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
        message = f"there is no kind {context['tag']!r}{nearest(context['tag'], valid)}"
    elif detail["type"] == "union_tag_not_found":
        message = "`kind` is missing"
    elif detail["type"] == "string_type" and not isinstance(given, dict | list):
        message = f"{message}, not {given!r}: quote it"
    if isinstance(located := context.get("error"), Located):
        return [list(place) for place in located.places], message
    return [as_written(path, config)], message


def _of_name(kind: str, name: Any) -> str | None:
    """What is wrong with the name of a preset; None for other keys."""
    if kind == "string_type":
        return "a name must be a string: quote it"
    if kind == "string_too_long":
        return f"a name must have at most {LONGEST} characters, since it is part of file names; this one has {len(name)}"
    if kind == "string_pattern_mismatch":
        return "a name must consist of letters, digits, `_`, `.` and `-`, and begin with a letter or a digit"
    return None


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def as_written(path: list[str], config: Any) -> list[str]:
    """The location without the union tags that pydantic inserts."""
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
    """Valid keys of the preset or section at `path` in a model; paths include names of presets and tags of unions."""
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
        annotation = STRUCTURES.union
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    arguments = typing.get_args(annotation)
    parts = arguments[:1] if typing.get_origin(annotation) is Annotated else arguments
    return [model for part in parts for model in _models(part)]


def _kind(model: type[BaseModel]) -> str | None:
    """The only value of a model's `kind`."""
    return typing.get_args(model.model_fields["kind"].annotation)[0] if "kind" in model.model_fields else None
