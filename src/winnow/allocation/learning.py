"""Trains a size (or dense) for every group of matrices on the loss of the whole model: for `learned` allocations.

The dense model is loaded once and not trained: every chosen matrix also has its factors (`winnow.allocation.masks`), and only two
parameters per matrix are trained. The resulting sizes are evaluated as they would be stored, on held-out windows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.allocation.base import stored_bytes
from winnow.allocation.groups import Group, allocate
from winnow.allocation.masks import Masked, Sizes
from winnow.calibration.reader import Layers
from winnow.checkpoint.loading import load_model
from winnow.errors import InputError
from winnow.factors.members import fit_file
from winnow.models.files import ModelFiles
from winnow.recovery.training import batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io import specs

log = logging.getLogger(__name__)
WIDTHS = (0.02, 0.005)  # widths of a cut, as a share of the largest size, in the first and the last step
DECIDED = 0.5  # share of the steps after which gates are fixed and only cuts are trained


@dataclass(frozen=True)
class Learned:
    """Sizes (None: dense), and the record of training for learned.json."""

    sizes: dict[str, int | None]
    record: dict[str, Any]


def put_masked(model: PreTrainedModel, groups: list[Group], factors: Mapping[str, Layers]) -> list[Masked]:
    """Add every group's factors to its dense matrix, in the model's dtype; returns the modules, initially dense."""
    first, found = next(model.parameters()), []
    for g in groups:
        (matrix,) = g.matrices
        fit = factors[g.name].tensors(fit_file(g.name))
        left, right = (fit[key].to(first.device, first.dtype) for key in ("left", "right"))
        parent, _, child = matrix.module.rpartition(".")
        module = Masked(model.get_submodule(matrix.module), left[:, : g.largest], right[: g.largest])
        setattr(model.get_submodule(parent), child, module)
        found.append(module)
    return found


def learn(
    files: ModelFiles,
    factors: Mapping[str, Layers],
    groups: list[Group],
    budget: specs.Budget,
    options: Any,
    windows: Tensor,
    dtype: str,
    device: str,
) -> Learned:
    """Train sizes for a budget with the allocation `learned` (`options`) on calibration windows (count, length).

    Raises InputError for experts of a mixture, a model without logits, too few windows, or bytes that cannot be met, and
    FloatingPointError, naming the step, if a loss or gradient is not finite."""
    for g in groups:
        if g.matrices[0].expert is not None:
            raise InputError(
                f"the size of {g.describe()} cannot be learned: experts of a mixture receive too few tokens; remove experts from "
                "the budget's targets, or choose another allocation"
            )
    held = max(1, round(len(windows) * options.held_out))
    if len(windows) - held < options.batch:
        raise InputError(
            f"{len(windows)} calibration windows, {held} of them held out, are too few for a batch of {options.batch}; use more "
            "calibration windows or a smaller `batch`"
        )
    start = allocate(groups, budget).sizes
    dense = sum(g.dense for g in groups)
    sizes = Sizes(groups, start, budget["keep_bytes"] * dense, device)
    model = load_model(files.verify(), dtype, device).requires_grad_(False)
    modules = put_masked(model, sizes.groups, factors)
    order = batches(len(windows) - held, options.batch, options.steps, options.seed)
    judged: list[dict[str, int | None]] = []  # by evaluation

    def loss(step: int) -> Tensor:
        if step == round(DECIDED * options.steps):
            sizes.gate.data.copy_(sizes.decided())
        ids = windows[order[step]].to(device).long()
        reference = reference_of(model, modules, ids)
        masks, lacking = sizes.masks(WIDTHS[0] * (WIDTHS[1] / WIDTHS[0]) ** (step / max(1, options.steps - 1)))
        for module, mask, rest in zip(modules, masks, lacking, strict=True):
            module.put(mask.to(reference.dtype), rest.to(reference.dtype), decided=step >= round(DECIDED * options.steps))
        found = kl_divergence(reference, logits_of(model, ids))
        if not found.requires_grad:  # everything is dense, and nothing remains to be trained
            found.requires_grad_()
        if not torch.isfinite(found):
            raise FloatingPointError(f"learn_sizes: the loss is not finite at step {step + 1}; lower `rate`")
        return found

    def held_out() -> float:
        judged.append(sizes.rounded() if judged else start)
        parts = windows[-held:].split(options.batch)
        return (
            math.fsum(len(part) * hard_loss(model, sizes, modules, judged[-1], part.to(device).long()) for part in parts) / held
        )

    progress = train("learn_sizes", {"cuts": sizes.cut, "gates": sizes.gate}, loss, held_out, options, {})
    looks = [
        {"step": step, "held_out": value, "keep_bytes": stored_bytes(groups, found) / dense, "left_dense": names_of_dense(found)}
        for (step, value), found in zip(progress.losses.items(), judged, strict=True)
    ]
    tokens = {"learned": len(windows) - held, "held_out": held, "tokens_per_step": options.batch * windows.shape[1]}
    record = {"loss": "KL divergence from the dense model, nats per token", "windows": tokens, **progress.report()}
    return Learned(judged[list(progress.losses).index(progress.best_step)], {**record, "looks": looks})


def names_of_dense(sizes: dict[str, int | None]) -> list[str]:
    return sorted(name for name, size in sizes.items() if size is None)


@torch.no_grad()
def reference_of(model: PreTrainedModel, modules: list[Masked], ids: Tensor) -> Tensor:
    """The dense model's logits for windows (count, length)."""
    for module in modules:
        module.mask = None
    return logits_of(model, ids)


@torch.no_grad()
def hard_loss(model: PreTrainedModel, sizes: Sizes, modules: list[Masked], chosen: dict[str, int | None], ids: Tensor) -> float:
    """KL divergence, in nats per token, on windows (count, length) with the factors truncated to the sizes."""
    reference = reference_of(model, modules, ids)
    for g, module in zip(sizes.groups, modules, strict=True):
        size = chosen[g.name]
        module.mask, module.lacking = None if size is None else module.left.new_ones(size), None
    return float(kl_divergence(reference, logits_of(model, ids)))


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits for windows (count, length). Raises InputError for a model without logits."""
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} has no logits, which `learned` needs; choose another allocation")
    return logits


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """(): the mean over tokens of KL(reference || logits), nats; both (..., classes)."""
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()
