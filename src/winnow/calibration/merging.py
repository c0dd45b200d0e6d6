"""Statistics of windows that several jobs ran: the sums of each job's windows, added up and divided by the number of all tokens.

Products are stored in the precision of the calibration and added in float64, so that the result is that of one job up to the
rounding of that precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.io.artifacts import read_tensors

if TYPE_CHECKING:
    from winnow.calibration.gradients import OutputMoments
    from winnow.calibration.statistics import Moments


def summed(file: Path, place: str, sums: type[Moments] | type[OutputMoments], precision: torch.dtype) -> Any:
    """The sums of a site, or of a role, from a file of the tensors of a layer's `sums`, in float64."""
    names = [field.name for field in fields(sums) if field.name != "precision"]
    found, _ = read_tensors(file, names=[f"{place}.{name}" for name in names])
    own = {name: found[f"{place}.{name}"] for name in names}
    return sums(precision, **{n: t.double() if t.is_floating_point() else t for n, t in own.items()})


def merged(
    files: list[Path], sums: type[Moments] | type[OutputMoments], precision: str, places: list[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (place, statistics) of the sites, or of the roles, of a layer, from every job's file of its `sums`, with one place in
    memory at a time. Means are in `precision`."""
    for place in places:
        parts = (summed(file, place, sums, getattr(torch, precision)) for file in files)
        yield place, reduce(sums.merge, parts).finish()  # type: ignore[arg-type]
