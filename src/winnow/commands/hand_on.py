"""A checkpoint in a format that does not need winnow, or to be shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from winnow.commands.formats import FORMATS
from winnow.errors import InputError


def hand_on(checkpoint: Path, directory: Path, form: str | None = None, options: dict[str, Any] | None = None) -> None:
    """Write `directory` from a checkpoint, with its results: in another format, a key of `FORMATS`, with `options` as the command
    was given them (None: not given); or unchanged, without `form`.

    Raises InputError if the directory exists, and for an option that the format does not have."""
    from winnow.checkpoint.share import measured_beside, share
    from winnow.io.artifacts import atomic

    given = {name: value for name, value in (options or {}).items() if value is not None}
    for name in given:
        if form is not None and name not in FORMATS[form].options:
            raise InputError(f"--{name}: the format {form} has no such option; remove it, or choose another --format")
    if directory.exists():
        raise InputError(f"{directory}: exists already; use a new directory")
    measured = measured_beside(checkpoint)
    said = "loads with winnow"
    with atomic(directory) as folder:
        if form is None:
            share(checkpoint, folder, measured)
        else:
            made = FORMATS[form].export(checkpoint, folder, measured, given)
            said = f"{made.bytes:,} bytes, {made.said}"
    numbers = f"{len(measured)} evaluations in its card" if measured else "no results in its card, as there are no evaluations"
    print(f"{directory}: {said}; {numbers}")
