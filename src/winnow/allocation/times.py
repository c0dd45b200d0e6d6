"""Measured times of the forms of matrices, as an allocation with a bound on the time reads them; `time_forms` measures them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from winnow.errors import InputError
from winnow.models.architectures import Matrix
from winnow.options import Strict

if TYPE_CHECKING:
    from winnow.allocation.groups import Group
    from winnow.io.records import TimesRecord

Key = tuple[str, tuple[tuple[int, int, bool], ...]]  # kind of structure; outputs, inputs and bias of every matrix


class Timing(Strict):
    """A bound on the time of the products with all matrices of the budget, one after the other, as a decoding step has them."""

    keep: float = Field(
        gt=0,
        description="largest sum of the times of the chosen forms, over that of the dense matrices; 1: no slower than dense",
    )
    tokens: int = Field(1, ge=1, description="tokens of a product: sequences that are decoded at the same time")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the products; null: that of the model's forward passes"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the products are measured")
    threads: int | None = Field(None, ge=1, description="threads of a CPU; null: all cores of the run")
    sizes: int = Field(
        6, ge=2, description="sizes measured of structures with many; the times of the others are interpolated linearly"
    )
    repeats: int = Field(15, ge=6, description="timed runs of every form, in turns with the dense matrix; the median counts")


def shapes_of(matrices: Sequence[Matrix]) -> tuple[tuple[int, int, bool], ...]:
    """What the time of a group depends on."""
    return tuple((*m.shape, m.bias) for m in matrices)


def with_times(groups: list[Group], record: TimesRecord) -> list[Group]:
    """The groups with the seconds of every size and of their dense matrices. Raises InputError for what was not measured."""
    dense = {(row["outputs"], row["inputs"], row["bias"]): row["seconds"]["median"] for row in record["dense"]}
    ratios: dict[Key, list[tuple[int, float]]] = {}
    for row in record["forms"]:
        key = (row["structure"], tuple((m["outputs"], m["inputs"], m["bias"]) for m in row["matrices"]))
        ratios.setdefault(key, []).append((row["size"], row["ratio"]["median"]))
    found = []
    for g in groups:
        shapes = shapes_of(g.matrices)
        measured = sorted(ratios.get((g.structure.kind(), shapes), []))
        if any(shape not in dense for shape in shapes) or (g.largest and not measured):
            raise InputError(f"the time of {g.describe()} was not measured; run `time_forms` of this model again")
        seconds = sum(dense[shape] for shape in shapes)
        times = [0.0] * len(g.numbers)
        if g.largest:
            sizes, of_dense = np.asarray(measured).T
            times = (np.interp(np.arange(len(g.numbers)), sizes, of_dense) * seconds).tolist()
        found.append(replace(g, times=times, dense_time=seconds))
    return found
