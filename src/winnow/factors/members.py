"""Fits of the members of a method, with names that distinguish members: `003.gate_proj` of the member `low_rank` is
`003.gate_proj@low_rank`. A method without alternatives is its only member, and its names have no suffix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, read_parquet

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from winnow.calibration.reader import Layers
    from winnow.io.records import FactorsManifest
    from winnow.structures.base import Structure


def by_member(structure: Structure, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(suffix of its names, path) for every path: equally many for each member, in the order of members. A single path belongs to
    all members, without a suffix."""
    suffixes = list(structure.alternatives()) if len(paths) > 1 else [""]
    if len(paths) % len(suffixes):
        raise RuntimeError(f"{len(paths)} files for {len(suffixes)} members")
    each = len(paths) // len(suffixes)
    yield from ((suffixes[number // each], path) for number, path in enumerate(paths))


def factors_of(structure: Structure, paths: Sequence[str]) -> tuple[dict[str, Bundle], dict[str, int]]:
    """({name: bundle with its fit}, {group of experts that stays dense: its calibration tokens}) from the manifests of
    factors."""
    found: dict[str, Bundle] = {}
    dense: dict[str, int] = {}
    for suffix, path in by_member(structure, paths):
        bundle = Bundle(path)
        manifest: FactorsManifest = bundle.manifest
        found |= {f"{name}{suffix}": bundle for name in manifest["groups"]}
        dense |= manifest["left_dense"]
    return found, dense


def member_table(structure: Structure, paths: Sequence[str]) -> pd.DataFrame:
    """The rows of all members' tables (spectra or predicted losses) by name."""
    import pandas as pd

    tables = []
    for suffix, path in by_member(structure, paths):
        table = read_parquet(path).set_index("group")
        tables.append(table.set_axis([f"{name}{suffix}" for name in table.index]))
    return pd.concat(tables)


def fit_file(name: str) -> str:
    """The file of a fit within the factors of its member."""
    return f"{name.partition('@')[0]}.safetensors"


def tensors_at(fits: Layers, file: str, size: int) -> dict[str, Tensor]:
    """The tensors of a fit from which a size is stored; those of all sizes, unless they are fitted again (`Refitted.at`)."""
    again = getattr(fits, "at", None)
    return again(file, size) if again else fits.tensors(file)
