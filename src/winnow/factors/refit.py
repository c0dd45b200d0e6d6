"""Factors without tensors, for models whose preset says `factors: refitted`: they hold the error of every size, and the predicted
loss if the fit reads all that it needs. The tensors are fitted again from the same weights and statistics where they are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.calibration.reader import Held, Layers, Statistics
from winnow.errors import InputError
from winnow.factors.fit import in_cached_dtype, needed, problem_of
from winnow.factors.members import factors_of
from winnow.factors.outer import OF_FITS, fit_outer, fit_outer_at
from winnow.factors.predict import PREDICTED, predict
from winnow.io.artifacts import Bundle
from winnow.metrics.base import METRICS, Metric
from winnow.models.architectures import Matrix, group_name
from winnow.models.files import ModelFiles
from winnow.structures.base import Structure

if TYPE_CHECKING:
    from winnow.io import specs

log = logging.getLogger(__name__)


class Source:
    """What the fits of a method, or of one of its members, were made from."""

    def __init__(
        self,
        files: ModelFiles,
        structure: Structure,
        metric: Metric | None,
        moments: Layers,
        gradients: Layers | None,
        outer: Layers | None,
        device: str,
    ):
        self.files, self.structure, self.metric = files, structure, metric
        self.inputs, self.outputs, self.rest = (Statistics(one, device) for one in (moments, gradients, outer))
        self.groups = {group_name(group): group for group in structure.groups(structure.supported(files.every))}

    def tensors(self, name: str, size: int | None) -> dict[str, Tensor]:
        """The tensors of a fit of every size, or those from which one is stored; as they would be cached. Raises InputError,
        naming the module, if a number is not finite or a decomposition fails."""
        began, group = time.monotonic(), self.groups[name]
        try:
            fitted = self._outer(group[0], size) if group[0].outer else self._block(group, size)
        except (FloatingPointError, ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(f"{group[0].module}: {error}") from error
        found = in_cached_dtype(self.structure, fitted)
        log.info("%s: fitted again, %s, %.2f s", name, "every size" if size is None else f"size {size}", time.monotonic() - began)
        return found

    def _block(self, group: list[Matrix], size: int | None) -> dict[str, Tensor]:
        self.inputs.keep(group)
        self.outputs.keep(group)
        needs = needed(self.structure, self.metric)
        problem = problem_of(self.files, group, self.inputs, self.outputs, {}, self.metric, needs)
        if size is None:
            return self.structure.fit(problem, self.structure.largest(group)).tensors
        return self.structure.fit_at(problem, size)

    def _outer(self, matrix: Matrix, size: int | None) -> dict[str, Tensor]:
        options = (self.files, self.structure, self.metric, matrix, self.rest, needed(self.structure, self.metric))
        return fit_outer(*options).tensors if size is None else fit_outer_at(*options, size)


class Refitted:
    """Fits of which some or all have no tensors in their files, with the interface of a bundle: it fits those again."""

    def __init__(self, stored: Layers, source: Source):
        self.stored, self.source = stored, source

    def tensors(self, file: str) -> dict[str, Tensor]:
        return self._found(file, None)

    def at(self, file: str, size: int) -> dict[str, Tensor]:
        """The tensors from which a size is stored."""
        return self._found(file, size)

    def _found(self, file: str, size: int | None) -> dict[str, Tensor]:
        found = self.stored.tensors(file)
        found.pop(PREDICTED, None)
        if not set(found) <= set(OF_FITS):
            return found
        return self.source.tensors(file.removesuffix(".safetensors"), size) | found


def without_tensors(
    files: ModelFiles,
    structure: Structure,
    metric: Metric | None,
    moments: Layers | None,
    gradients: Layers | None,
    outer: Layers | None,
    name: str,
    fit: dict[str, Tensor],
    device: str,
) -> dict[str, Tensor]:
    """What is stored of a fit whose tensors are left out: what all files of fits have, and the losses if they can be predicted
    from what it reads."""
    kept = {key: fit[key] for key in OF_FITS}
    if not structure.predicts_at_once(metric.needs if metric else ()):
        return kept
    inputs: Any = moments  # None where the fit is of the embeddings or the head, which `outer` is for
    outputs: Any = gradients
    ((_, losses),) = predict(files, inputs, outputs, {name: Held({f"{name}.safetensors": fit})}, structure, device, outer)
    return kept | {PREDICTED: losses}


def fits_of(
    files: ModelFiles, structure: Structure, method: specs.Method, paths: Mapping[str, Any], device: str
) -> tuple[dict[str, Layers], dict[str, int]]:
    """({name: source of its fit}, {group of experts that stays dense: its calibration tokens}) of a method. `paths` are the
    manifests of `factors`, and of `moments`, `gradients` and `outer` if fits are to be made again."""
    factors: Sequence[str] = paths["factors"]
    found, dense = factors_of(structure, factors)
    if not paths.get("moments"):
        return dict(found), dense
    moments = Bundle(paths["moments"])
    gradients, outer = (Bundle(paths[what]) if paths.get(what) else None for what in ("gradients", "outer"))
    sources = {}
    for end, own in structure.alternatives().items():
        metric = METRICS.build(method["metric"]) if method["metric"] and own.objective == "metric" else None
        if own.leaves_out(metric.needs if metric else ()):
            sources[end] = Source(files, own, metric, moments, gradients, outer, device)
    fits: dict[str, Layers] = {}
    for name, bundle in found.items():
        source = sources.get(name[name.find("@") :] if "@" in name else "")
        fits[name] = Refitted(bundle, source) if source else bundle
    return fits, dense
