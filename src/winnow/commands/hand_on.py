"""A checkpoint in a format that does not need winnow, or to be shared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.errors import InputError

if TYPE_CHECKING:
    from winnow.checkpoint.measured import Measured


def hand_on(command: str, checkpoint: Path, directory: Path, dtype: str, form: str) -> None:
    """Write `directory` from a checkpoint, with its results: in another format (`export`, with `form` `dense` or
    `compressed-tensors`, and `dtype`) or unchanged (`share`)."""
    from winnow.checkpoint.share import measured_beside, share
    from winnow.io.artifacts import atomic

    if directory.exists():
        raise InputError(f"{directory}: exists already; use a new directory")
    measured = measured_beside(checkpoint)
    said = "loads with winnow"
    with atomic(directory) as folder:
        if command == "share":
            share(checkpoint, folder, measured)
        else:
            said = _exported(form, checkpoint, folder, measured, dtype)
    numbers = f"{len(measured)} evaluations in its card" if measured else "no results in its card, as there are no evaluations"
    print(f"{directory}: {said}; {numbers}")


def _exported(form: str, checkpoint: Path, folder: Path, measured: list[Measured], dtype: str) -> str:
    """Write an export; returns a description of it."""
    if form == "dense":
        from winnow.checkpoint.export import export_dense

        made = export_dense(checkpoint, folder, None, measured, dtype)
        how, needs = f"in {made.dtype}", "dense, does not need winnow"
    else:
        from winnow.checkpoint.packed import export_packed

        made = export_packed(checkpoint, folder, None, measured, dtype)
        needs = f"transformers loads it with the package compressed-tensors, without winnow; {made.engine}"
        how = f"loaded in {made.dtype}"
    return f"{made.bytes:,} bytes, {how} with a relative rounding error of {made.error:.1e}; {needs}"
