"""Fits of the embeddings and the head, and their predicted losses. Their rows are independent (see `winnow.calibration.outer`),
and there can be hundreds of thousands of them, so that some are fitted at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from winnow.calibration.reader import Statistics
from winnow.factors.shrinkage import expected
from winnow.metrics.base import Metric
from winnow.models.architectures import GRADIENTS, Matrix, by_rows
from winnow.models.files import ModelFiles
from winnow.structures.base import Fit, Problem, Structure

OF_FITS = ("spectrum", "error", "numbers")  # tensors of a stored fit without a row for every row of the matrix
PARTS = {"tied": ("embed_tokens", "lm_head")}  # the roles whose predicted losses are added; by default the matrix's own


def fit_outer(
    files: ModelFiles, structure: Structure, metric: Metric | None, matrix: Matrix, statistics: Statistics, needs: list[str]
) -> Fit:
    """The fit of a matrix of `files.outer`, at every size."""
    problems = _parts(files, metric, matrix, statistics, needs)
    found = [structure.fit(problem, structure.largest(problem.group)) for problem in problems]
    error = torch.stack([fit.error for fit in found]).sum(0)
    return Fit(_joined([fit.tensors for fit in found]), error, error[0].sqrt()[None])


def fit_outer_at(
    files: ModelFiles,
    structure: Structure,
    metric: Metric | None,
    matrix: Matrix,
    statistics: Statistics,
    needs: list[str],
    size: int,
) -> dict[str, Tensor]:
    """The tensors of one size of that fit, see `Structure.fit_at`."""
    return _joined([structure.fit_at(problem, size) for problem in _parts(files, metric, matrix, statistics, needs)])


def _parts(
    files: ModelFiles, metric: Metric | None, matrix: Matrix, statistics: Statistics, needs: list[str]
) -> Iterator[Problem]:
    """What the fits of the parts of a matrix are given."""
    device, weight, name = statistics.device, files.stored(matrix), matrix.name
    site = statistics.of(matrix, matrix.site, [need for need in needs if need not in GRADIENTS])
    output = statistics.of(matrix, matrix.role, [need for need in needs if need in GRADIENTS])
    for part, rows in by_rows(matrix):
        own = {key: value[rows] for key, value in output.items()}
        weights = {name: weight[rows].to(device).double().contiguous()}
        yield Problem([part], weights, {name: site}, metric, statistics.precision, outputs={name: own})


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def predict_outer(
    files: ModelFiles, structure: Structure, matrix: Matrix, statistics: Statistics, fit: dict[str, Tensor]
) -> Tensor:
    """(sizes + 1,): predicted increase of the loss at every size of a fit of a matrix of `files.outer`, summed over its roles."""
    device, weight, name, total = statistics.device, files.stored(matrix), matrix.name, torch.tensor(0.0)
    for role in PARTS.get(matrix.role, (matrix.role,)):
        site = statistics.of(matrix, role, ["gram", "count"])
        weights = statistics.of(matrix, role, ["gradient_gram"])["gradient_gram"]
        gram = {"gram": expected(site["gram"], int(site["count"]))}
        for part, rows in by_rows(matrix):
            own = {name: weight[rows].to(device).double().contiguous()}
            outputs = {name: {"gradient_gram": weights[rows]}}
            problem = Problem([part], own, {name: gram}, None, statistics.precision, outputs=outputs)
            tensors = {key: value if key in OF_FITS else value[rows].to(device) for key, value in fit.items()}
            total = total + structure.predicted(problem, tensors)
    return total
