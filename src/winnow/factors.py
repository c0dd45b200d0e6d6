"""Fitting every group of matrices of a model once, for every size; the factors that allocation and compression cut."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from winnow.architectures import Matrix, group_name, moments_file
from winnow.errors import InputError
from winnow.io import Bundle
from winnow.metrics import Metric
from winnow.models import ModelFiles
from winnow.structures.base import Fit, Problem, Structure

log = logging.getLogger(__name__)


def shard_of(groups: list[list[Matrix]], shard: str) -> list[list[Matrix]]:
    """The groups of one job: shard `2-of-8` takes the second eighth of them, so that it reads the files of few layers."""
    index, total = (int(part) for part in shard.split("-of-"))
    return groups[len(groups) * (index - 1) // total : len(groups) * index // total]


def fit_groups(
    files: ModelFiles, moments: Bundle | None, structure: Structure, metric: Metric, shard: str, device: str
) -> Iterator[tuple[str, Fit]]:
    """Yield (group name, fit) for the shard's groups of all matrices of the model.

    Raises InputError naming the matrix if its weight or its statistics are not finite.
    """
    groups = shard_of(structure.groups(files.matrices), shard)
    cached: dict[int, dict[str, Tensor]] = {}
    for number, group in enumerate(groups):
        began = time.monotonic()
        sites: dict[str, dict[str, Tensor]] = {}
        precision = torch.finfo(torch.float64).eps
        needs = dict.fromkeys((*metric.needs, *structure.needs()))
        if needs:
            assert moments is not None
            layers = {matrix.layer for matrix in group}
            cached = {n: cached[n] if n in cached else moments.tensors(moments_file(n)) for n in sorted(layers)}
            for matrix in group:
                found = {need: cached[matrix.layer][f"{matrix.site}.{need}"] for need in needs}
                precision = max(torch.finfo(value.dtype).eps for value in found.values())
                sites[matrix.name] = {need: value.double().to(device) for need, value in found.items()}
        weights = {matrix.name: files.weight(matrix).to(device) for matrix in group}
        name = group_name(group)
        try:
            fit = structure.fit(Problem(group, weights, sites, metric, precision), structure.largest(group))
        except (FloatingPointError, ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(f"{group[0].module}: {error}") from error
        kept = float(1 - fit.error[-1] / fit.error[0]) if fit.error[0] > 0 else 1.0
        log.info(
            "%d of %d: %s, largest size %d keeps %.6f of the metric's energy, %.2f s",
            number + 1, len(groups), name, len(fit.error) - 1, kept, time.monotonic() - began,
        )  # fmt: skip
        yield name, fit
