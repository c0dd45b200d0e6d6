"""Results that no preset of the current configuration uses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from winnow.io.artifacts import MANIFEST

LABEL = re.compile(r".+-[0-9a-f]{6}")  # of a preset: its name and the hash of its content
BESIDE = ".states"  # ends the stem of what a job of an evaluation keeps beside its result


def unreached(results: Path, labels: set[str]) -> Iterator[tuple[Path, int]]:
    """(path, bytes) of the outermost files and folders below `results` whose label is not in `labels`."""
    for path in sorted(results.iterdir()) if results.is_dir() else []:
        label = path.name if path.is_dir() else path.stem.removesuffix(BESIDE)
        if LABEL.fullmatch(label) and label not in labels:
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            yield path, sum(p.stat().st_size for p in files)
        elif path.is_dir() and not (path / MANIFEST).is_file():  # a bundle belongs to its parent folder
            yield from unreached(path, labels)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
