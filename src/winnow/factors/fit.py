"""Fits every group of matrices of a model once for all sizes; allocation and compression truncate these factors."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.calibration.reader import Layers, Statistics
from winnow.errors import InputError
from winnow.factors.outer import fit_outer
from winnow.metrics.base import Metric
from winnow.models.architectures import GRADIENTS, OUTER, Matrix, group_name, moments_file, reads
from winnow.models.files import ModelFiles
from winnow.numerics.host import on_host
from winnow.structures.base import Fit, Problem, Structure

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def shard_of(files: ModelFiles, structure: Structure, shard: str) -> list[list[Matrix]]:
    """The groups of one job: shard `2-of-8` is the second eighth of those of the blocks, of which consecutive ones need the files
    of few layers; shard `outer` is the embeddings and the head."""
    if shard == OUTER:
        return structure.groups(structure.supported(files.outer))
    groups = structure.groups(files.matrices)
    index, total = (int(part) for part in shard.split("-of-"))
    return groups[len(groups) * (index - 1) // total : len(groups) * index // total]


def labels_by_matrix(table: pd.DataFrame) -> dict[str, Tensor]:
    """{matrix name: labels (channels,)} of a clusters.parquet."""
    return {
        f"{layer:03d}.{role}": torch.tensor(rows["cluster"].tolist())  # rows are in the order of the channels
        for (layer, role), rows in table.groupby(["layer", "role"], sort=False)
    }


def left_dense(
    files: ModelFiles, moments: Layers | None, structure: Structure, metric: Metric | None, shard: str
) -> dict[str, int]:
    """{group name: calibration tokens} of the shard's experts that stay dense: all if the fit needs gradients; otherwise, if it
    needs statistics, those with fewer tokens than inputs, whose second moment is singular."""
    needs = {*(metric.needs if metric else ()), *structure.needs()}
    found: dict[str, int] = {}
    layers: dict[int, dict[str, Tensor]] = {}
    for group in shard_of(files, structure, shard):
        if group[0].expert is None or not needs:
            continue
        assert moments is not None or needs <= set(GRADIENTS)
        tokens = 0
        if moments is not None:
            if group[0].layer not in layers:
                layers = {group[0].layer: moments.tensors(moments_file(group[0].layer))}
            tokens = int(layers[group[0].layer][f"{group[0].site}.count"])
        if needs & set(GRADIENTS) or tokens < max(m.shape[1] for m in group):
            found[group_name(group)] = tokens
    return found


def needed(structure: Structure, metric: Metric | None) -> list[str]:
    """The statistics that a fit reads."""
    return list(dict.fromkeys((*(metric.needs if metric else ()), *structure.needs())))


def problem_of(
    files: ModelFiles,
    group: list[Matrix],
    inputs: Statistics,
    outputs: Statistics,
    labels: dict[str, Tensor],
    metric: Metric | None,
    needs: list[str],
) -> Problem:
    """What a fit of a group is given. Raises FloatingPointError, naming the tensor, if a number is not finite."""
    device = inputs.device
    return Problem(
        group,
        {m.name: files.weight(m, device) for m in group},
        {m.name: inputs.of(m, m.site, [n for n in needs if n not in GRADIENTS and reads(m, n)]) for m in group},
        metric,
        inputs.precision,
        {m.name: files.tensor(f"{m.module}.bias").double().to(device) for m in group if m.bias},
        {m.name: outputs.of(m, m.role, [n for n in needs if n in GRADIENTS]) for m in group},
        {m.name: labels[m.name] for m in group if m.name in labels},
    )


def fit_groups(
    files: ModelFiles,
    moments: Layers | None,
    gradients: Layers | None,
    labels: dict[str, Tensor],
    structure: Structure,
    metric: Metric | None,
    shard: str,
    device: str,
    done: Collection[str] = (),
) -> Iterator[tuple[str, Fit, list[int]]]:
    """Yield (group name, fit, numbers stored at every size) for the shard's groups of all matrices of the model. For the shard
    `outer`, `moments` are the statistics of embeddings and head.

    The last size is the largest that stores less than the dense matrices. `labels` are clusters by matrix name, for structures
    that need them; groups in `done` are skipped. Raises InputError, naming the matrix, if its weight or statistics are not
    finite.
    """
    groups = [group for group in shard_of(files, structure, shard) if group_name(group) not in done]
    dense_experts = left_dense(files, moments, structure, metric, shard)
    inputs, outputs = Statistics(moments, device), Statistics(gradients, device)
    needs = needed(structure, metric)
    for number, group in enumerate(groups):
        began = time.monotonic()
        name = group_name(group)
        if name in dense_experts:
            log.info("%d of %d: %s stays dense: %d tokens", number + 1, len(groups), name, dense_experts[name])
            continue
        inputs.keep(group)
        outputs.keep(group)
        try:
            if group[0].outer:
                fit = fit_outer(files, structure, metric, group[0], inputs, needs)
            else:
                problem = problem_of(files, group, inputs, outputs, labels, metric, needs)
                fit = structure.fit(problem, structure.largest(group))
        except (FloatingPointError, ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(f"{group[0].module}: {error}") from error
        if not torch.isfinite(fit.error).all():
            raise InputError(f"{group[0].module}: the error of the fit is not finite")
        dense = sum(m.shape[0] * m.shape[1] + (m.shape[0] if m.bias and structure.bias_name is None else 0) for m in group)
        numbers = [structure.numbers(group, size, fit.tensors) for size in range(len(fit.error))]
        last = max((size for size, count in enumerate(numbers) if count < dense), default=0)
        fit, numbers = replace(fit, error=fit.error[: last + 1]), numbers[: last + 1]
        kept = float(1 - fit.error[-1] / fit.error[0]) if fit.error[0] > 0 else 1.0
        log.info(
            "%d of %d: %s, largest size %d keeps %.6f of the objective, %.2f s",
            number + 1, len(groups), name, len(fit.error) - 1, kept, time.monotonic() - began,
        )  # fmt: skip
        yield name, fit, numbers


def storable(structure: Structure, fit: Fit) -> dict[str, Tensor]:
    """The fit's tensors in the dtype in which they are cached: float32, or float64 for those in `in_float64`."""
    return in_cached_dtype(structure, fit.tensors)


def in_cached_dtype(structure: Structure, fitted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for tensors of a fit."""
    tensors = {}
    for name, tensor in fitted.items():
        single = tensor.is_floating_point() and name not in structure.in_float64
        tensors[name] = on_host(tensor.float() if single else tensor)
    return tensors
