"""The formats of `winnow export`, each with the function that writes it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from winnow.checkpoint.card import Exported
    from winnow.checkpoint.measured import Measured


class Format(NamedTuple):
    """A format: its function, imported when it is asked for, and a description for the help."""

    module: str
    function: str
    help: str
    options: tuple[str, ...] = ("dtype",)  # of the function, and of the command

    def export(self, source: Path, directory: Path, measured: list[Measured], options: dict[str, Any]) -> Exported:
        """Write the checkpoint `source` to a new directory, with its results in the card."""
        return getattr(import_module(self.module), self.function)(source, directory, None, measured, **options)


FORMATS = {
    "dense": Format("winnow.checkpoint.export", "export_dense", "every tool reads it (default)"),
    "compressed-tensors": Format(
        "winnow.checkpoint.packed", "export_packed", "as small as the checkpoint, for rounded matrices only"
    ),
    "gguf": Format(
        "winnow.engines.gguf.export",
        "export_gguf",
        "for llama.cpp; rounded matrices keep their numbers, others are multiplied out",
        ("dtype", "matrices", "embeddings"),
    ),
}
