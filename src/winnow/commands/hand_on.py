"""A checkpoint as a dense model, or to be shared."""

from __future__ import annotations

from pathlib import Path

from winnow.errors import InputError


def hand_on(command: str, checkpoint: Path, directory: Path, dtype: str) -> None:
    """Write `directory` from a checkpoint, as a dense model in `dtype` (`export`) or unchanged (`share`), with its results."""
    from winnow.checkpoint.export import export_dense
    from winnow.checkpoint.share import measured_beside, share
    from winnow.io.artifacts import atomic

    if directory.exists():
        raise InputError(f"{directory}: exists already; use a new directory")
    measured = measured_beside(checkpoint)
    said = "loads with winnow"
    with atomic(directory) as folder:
        if command == "export":
            made = export_dense(checkpoint, folder, None, measured, dtype)
            rounded = f"in {made.dtype} with a relative rounding error of {made.error:.1e}"
            said = f"{made.bytes:,} bytes, {rounded}; dense, does not need winnow"
        else:
            share(checkpoint, folder, measured)
    numbers = f"{len(measured)} evaluations in its card" if measured else "no results in its card, as there are no evaluations"
    print(f"{directory}: {said}; {numbers}")
