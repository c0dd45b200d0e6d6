"""What the members of a method were fitted to, under names that tell members apart: `003.gate_proj` of the member `low_rank` is
`003.gate_proj@low_rank`. A method without alternatives is its own only member, and the names are the groups'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, read_parquet

if TYPE_CHECKING:
    import pandas as pd

    from winnow.structures.base import Structure


def by_member(structure: Structure, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(suffix of its names, path) for every path: as many for each member, all of the first one first. One path alone is of them
    all, with names as they are."""
    suffixes = list(structure.alternatives()) if len(paths) > 1 else [""]
    if len(paths) % len(suffixes):
        raise RuntimeError(f"{len(paths)} files for {len(suffixes)} members")
    each = len(paths) // len(suffixes)
    yield from ((suffixes[number // each], path) for number, path in enumerate(paths))


def factors_of(structure: Structure, paths: Sequence[str]) -> tuple[dict[str, Bundle], dict[str, int]]:
    """({name: the bundle that holds its fit}, {group of experts that stays dense: its calibration tokens}) of manifests of
    factors."""
    found: dict[str, Bundle] = {}
    dense: dict[str, int] = {}
    for suffix, path in by_member(structure, paths):
        bundle = Bundle(path)
        found |= {f"{name}{suffix}": bundle for name in bundle.manifest["groups"]}
        dense |= bundle.manifest["left_dense"]
    return found, dense


def table_of(structure: Structure, paths: Sequence[str]) -> pd.DataFrame:
    """The rows of all members' tables (spectra or predicted losses) by name."""
    import pandas as pd

    tables = []
    for suffix, path in by_member(structure, paths):
        table = read_parquet(path).set_index("group")
        tables.append(table.set_axis([f"{name}{suffix}" for name in table.index]))
    return pd.concat(tables)


def fit_file(name: str) -> str:
    """The file of a fit in the factors of its member."""
    return f"{name.partition('@')[0]}.safetensors"
