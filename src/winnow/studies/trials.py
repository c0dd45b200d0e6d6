"""Compressed models in memory, as loaded from checkpoints, with their losses and times: for sweeps, where a job per point would
cost more than the point."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from winnow.allocation.base import ALLOCATIONS
from winnow.allocation.groups import Group, chosen_groups
from winnow.checkpoint.in_memory import put
from winnow.checkpoint.writer import compress
from winnow.factors.fit import fit_groups, storable
from winnow.metrics.base import METRICS
from winnow.models.architectures import group_name, select
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.evaluation.results import PerWindow
    from winnow.io import specs
    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.studies.records import TimeRow


class Factors:
    """The fit of one group, with the interface of a bundle of files."""

    def __init__(self, held: dict[str, Tensor]):
        self.held = held

    def tensors(self, _name: str) -> dict[str, Tensor]:
        return self.held


@dataclass(frozen=True)
class Trial:
    """A method fitted to some targets of a model for every size."""

    files: ModelFiles
    structure: Any
    factors: dict[str, Any]
    groups: list[Group]

    @classmethod
    def of(
        cls, files: ModelFiles, moments: Bundle | None, method: dict[str, Any], device: str, targets: Sequence[str] = ("ffn",)
    ) -> Trial:
        """Fit a method ({structure, metric}, as in a preset) only to the matrices named by a budget's `targets`. Raises
        InputError, naming the matrix, if that fails."""
        structure = STRUCTURES.build(method["structure"])
        metric = METRICS.build(method["metric"]) if method.get("metric") else None
        factors, rows = {}, {}
        chosen = {m.name for m in select(files.matrices, list(targets))}
        others = [group_name(g) for g in structure.groups(files.matrices) if not any(m.name in chosen for m in g)]
        for name, fit, numbers in fit_groups(files, moments, None, {}, structure, metric, "1-of-1", device, others):
            factors[name] = Factors(storable(structure, fit))
            rows[name] = {"numbers": numbers, "error": fit.error.tolist()}
        groups = chosen_groups(files, structure, list(targets), pd.DataFrame.from_dict(rows, orient="index"))
        return cls(files, structure, factors, groups)

    def of_rank(self, share: float) -> dict[str, int | None]:
        """{group: size} at a share of each group's whole size, as `rank_fraction` of a budget; at most the largest size that
        stores less than dense."""
        return {g.name: min(g.largest, max(1, round(share * g.structure.whole(g.matrices)))) for g in self.groups}

    def of_bytes(self, keep: float) -> dict[str, int | None]:
        """{group: size} that store at most a share of the dense bytes, distributed uniformly."""
        return ALLOCATIONS.build({"kind": "uniform"}).allocate(self.groups, keep).sizes

    def kept(self, sizes: dict[str, int | None]) -> float:
        """Stored bytes of the targets as a share of the dense ones."""
        return sum(g.bytes(sizes[g.name]) for g in self.groups) / sum(g.dense for g in self.groups)

    def model(self, dense: PreTrainedModel, sizes: dict[str, int | None]) -> PreTrainedModel:
        """A copy of the dense model, compressed to these sizes, with its dtype and device."""
        stored, layouts = compress(self.files, self.factors, self.structure, sizes)
        model = copy.deepcopy(dense)
        put(model, stored, layouts)
        return model.eval()


def loss(model: PreTrainedModel, ids: Tensor, first: Tensor) -> PerWindow:
    """`nll` and `tokens` per window (see `winnow.evaluation.perplexity.evaluate`), in batches of about 4,096 tokens."""
    from winnow.evaluation.perplexity import evaluate

    with torch.no_grad():
        return evaluate(model, None, ids, first, max(1, 4096 // ids.shape[1]))


def time_forms(dense: PreTrainedModel, forms: Mapping[str, PreTrainedModel], spec: specs.Timing, device: str) -> list[TimeRow]:
    """Times of every form relative to the dense model, in turns with it, by the `spec` of
    `winnow.evaluation.latency.evaluate_latency` (prompts limited by the model's positions): a row per form, phase, batch and
    prompt with the median `ratio` and its 95 % interval, the quartiles of dense against dense (`control_*`), the verdict,
    products and bytes read relative to dense, and the machine."""
    from winnow.evaluation.latency import evaluate_latency

    held = getattr(dense.config.get_text_config(), "max_position_embeddings", None)
    prompts = [min(length, held - spec["decode"] - 1) if held else length for length in spec["prompts"]]
    rows: list[TimeRow] = []
    for name, form in forms.items():
        found = evaluate_latency(dense, form, {**spec, "prompts": prompts}, device)
        for case in found["cases"]:
            own, control = case["compressed"], case["control"]["ratio"]
            rows.append(
                {
                    "form": name,
                    "phase": case["phase"],
                    "batch": case["batch"],
                    "prompt": case["prompt"],
                    "ratio": own["ratio"]["median"],
                    "ratio_low": own["ratio"]["low"],
                    "ratio_high": own["ratio"]["high"],
                    "control_q1": control["q1"],
                    "control_q3": control["q3"],
                    "verdict": own["verdict"],
                    "flops": own["flops"] / case["dense"]["flops"],
                    "weight_bytes": own["weight_bytes"] / case["dense"]["weight_bytes"],
                    "device": found["machine"]["device"],
                    "name": found["machine"]["name"],
                    "threads": found["machine"]["threads"],
                }
            )
    return rows
