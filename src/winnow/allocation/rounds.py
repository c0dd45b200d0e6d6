"""Repeated predictions around the compressed model: the quadratic model of the loss is accurate near its origin, and a small
budget leads far from the dense model.

On the path from the dense model to the compressed one the loss is the integral of (1 - t) times the curvature at t; with a
linearly changing curvature, this is 2/3 of the prediction around the dense model plus 1/3 of that around the compressed one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.allocation.groups import Group, allocate
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.outer import collect_outer
from winnow.calibration.reader import Layers
from winnow.calibration.statistics import collect
from winnow.checkpoint.in_memory import put
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.writer import compress
from winnow.data.tokens import check_causal
from winnow.evaluation.perplexity import evaluate
from winnow.factors.beside import put_beside
from winnow.factors.predict import predict
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles
from winnow.structures.base import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io import specs
    from winnow.io.records import RoundRecord

log = logging.getLogger(__name__)
AROUND_DENSE = 2  # weight of the prediction around the dense model, relative to that of a round


class Held:
    """Statistics in memory, with the interface of a bundle of files."""

    def __init__(self, layers: Iterator[tuple[int, dict[str, dict[str, Tensor]]]]):
        self.files = {
            moments_file(layer): {f"{place}.{key}": value for place, values in found.items() for key, value in values.items()}
            for layer, found in layers
        }

    def tensors(self, name: str) -> dict[str, Tensor]:
        return self.files[name]


@dataclass(frozen=True)
class Setting:
    """The data that a model is run on: calibration windows (count, length), batch size, and options of their statistics."""

    windows: Tensor
    batch: int
    dtype: str
    device: str
    precision: torch.dtype
    first_token: bool
    labels: str
    seed: int


def compressed_model(
    files: ModelFiles, factors: Mapping[str, Layers], structure: Structure, sizes: dict[str, int | None], setting: Setting
) -> PreTrainedModel:
    """The model with its groups at these sizes, in memory, as loaded from a checkpoint; FFNs that are replaced as a whole also
    run their dense matrices, for statistics."""
    stored, layouts = compress(files, factors, structure, sizes)
    model = load_model(files.verify(), setting.dtype, setting.device)
    whole = [g for name, own, g in structure.fits(files.matrices) if own.bias_name is None and sizes.get(name) is not None]
    names = {name for group in whole for name in (*(m.module for m in group), group[-1].activation)}
    dense = {name: model.get_submodule(name) for name in names}
    put(model, stored, layouts)
    for group in whole:
        put_beside(model, group, dense)
    return model.eval()


def calibration_loss(model: PreTrainedModel, setting: Setting) -> float:
    """Next-token loss on the calibration windows, nats per token."""
    windows = setting.windows
    rows = evaluate(model, None, windows, torch.ones(len(windows), dtype=torch.int64), setting.batch)
    return sum(rows["nll"]) / sum(rows["tokens"])


def around(
    model: PreTrainedModel, files: ModelFiles, factors: Mapping[str, Layers], structure: Structure, setting: Setting
) -> dict[str, Tensor]:
    """{name of a fit: predicted loss of every size} with the second moments of inputs and gradients in `model`, dense or
    compressed."""
    s = setting
    moments = Held(collect(model, files.matrices, s.windows, s.batch, s.precision, s.first_token))
    gradients = Held(collect_gradients(model, files.matrices, s.windows, s.batch, s.precision, s.labels, s.seed, s.first_token))
    outer = None
    if any(name.partition("@")[0] == m.name for name in factors for m in files.outer):
        outer = Held(collect_outer(model, files.outer, s.windows, s.batch, s.precision, s.labels, s.seed, s.first_token))
    found: dict[str, Tensor] = {}
    for end, own in structure.alternatives().items():
        mine = {name.removesuffix(end): bundle for name, bundle in factors.items() if name.endswith(end)}
        found |= {f"{name}{end}": losses for name, losses in predict(files, moments, gradients, mine, own, s.device, outer)}
    return found


def predict_in_rounds(
    files: ModelFiles,
    factors: Mapping[str, Layers],
    structure: Structure,
    groups: list[Group],
    budget: specs.Budget,
    rounds: int,
    setting: Setting,
) -> tuple[dict[str, list[float]], list[RoundRecord]]:
    """({group: predicted loss of every size}, a record per round): of the first and `rounds` further predictions, the one whose
    allocation has the lowest loss on the calibration windows. `groups` have the prediction around the dense model.

    Raises InputError for a model without next-token prediction.
    """
    check_causal(files.manifest)
    current = {
        g.name: torch.tensor(g.predicted, dtype=torch.float64)
        for g in groups
        if g.predicted is not None and g.name in factors  # without the dense alternatives, which have no loss
    }
    found: list[dict[str, Tensor]] = []
    records: list[RoundRecord] = []
    for number in range(rounds + 1):
        tabled = [replace(g, predicted=current[g.name].tolist()) if g.name in current else g for g in groups]
        sizes = allocate(tabled, budget).sizes
        model = compressed_model(files, factors, structure, sizes, setting)
        loss = calibration_loss(model, setting)
        dense = sum(size is None for size in sizes.values())
        predicted = sum(float(current[name][size]) for name, size in sizes.items() if size is not None)
        log.info("round %d: %.5f nats per token on the calibration windows, %d groups dense", number, loss, dense)
        found.append(current)
        records.append({"round": number, "calibration_nll": loss, "predicted": predicted, "left_dense": dense})
        if number < rounds:
            anew, weight = around(model, files, factors, structure, setting), AROUND_DENSE + number
            current = {name: (weight * before + anew[name]) / (weight + 1) for name, before in current.items()}
    best = min(records, key=lambda record: record["calibration_nll"])["round"]
    for record in records:
        record["chosen"] = record["round"] == best
    return {name: losses.tolist() for name, losses in found[best].items()}, records
