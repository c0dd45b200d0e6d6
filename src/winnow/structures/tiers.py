"""`tiers`: columns in order of importance; the first are exact, the others in tiers that share the rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from winnow.calibration.clusters import Clustering
from winnow.models.architectures import Matrix
from winnow.structures.base import Problem, StructureOptions
from winnow.structures.cluster import Cluster

if TYPE_CHECKING:
    from torch import Tensor


class Tiers(Cluster):
    """The published "activation-weighted" FFN compression: `exact` columns are kept, then tiers of the columns receive shares of
    the rank k - exact, by unweighted SVD. A tier is stored dense if its factors would be larger."""

    reference = "HyperTensor Paper VII, p2_ffn_actweighted.py"
    stores = "exact columns, per tier left (m, k_c) and right (k_c, n_c) or the dense block; order of the columns (n indices)"
    formula = "m e + sum_c min(k_c (m + n_c), m n_c)"

    class Options(StructureOptions):
        kind: Literal["tiers"]
        score: Literal["mean_abs", "weight_norm", "random"] = Field(
            "mean_abs", description="importance of a column: mean absolute input, own L2 norm, or random"
        )
        exact: int = Field(32, ge=0, description="columns kept unchanged")
        columns: list[float] = Field([0.15, 0.35, 0.5], min_length=1, description="shares of the other columns")
        ranks: list[float] = Field([0.5, 0.3, 0.2], min_length=1, description="shares of the remaining rank")
        seed: int = Field(0, ge=0, description="seed of the random importance")

        @model_validator(mode="after")
        def _whole(self) -> Tiers.Options:
            if len(self.columns) != len(self.ranks) or any(abs(sum(v) - 1) > 1e-9 for v in (self.columns, self.ranks)):
                raise ValueError("`columns` and `ranks` must have the same length (one share per tier) and each sum to 1")
            return self

    options: Options  # type: ignore[assignment]

    def clustering(self) -> Clustering | None:
        return None

    def control(self) -> StructureOptions | None:
        return None if self.options.score == "random" else self.options.model_copy(update={"score": "random"})

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        return [[m] for m in matrices]

    def needs(self) -> tuple[str, ...]:
        return ("mean_abs",) if self.options.score == "mean_abs" else ()

    def on_rows(self, matrix: Matrix) -> bool:
        return False

    def limit(self, group: list[Matrix]) -> int:
        n, shares = group[0].shape[1], zip(self.options.columns, self.options.ranks, strict=True)
        return self.options.exact + max(math.ceil((n * columns + 1) / ranks) for columns, ranks in shares)  # all are dense

    def whole(self, group: list[Matrix]) -> int:
        return group[0].shape[1]  # the published rank is a share of the columns

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        n = group[0].shape[1]
        return n * (2 if n < 2**15 else 4)

    def labels(self, problem: Problem) -> Tensor:
        import torch

        matrix, options = problem.group[0], self.options
        weight = (problem.metric_weights or problem.weights)[matrix.name]
        if options.score == "weight_norm":
            score = weight.norm(dim=0)
        elif options.score == "mean_abs":
            score = problem.sites[matrix.name]["mean_abs"]
        else:
            score = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(options.seed)).double()
        order = score.argsort(descending=True, stable=True).cpu()
        labels = torch.full((len(order),), len(options.columns), dtype=torch.int64)
        labels[order[: options.exact]] = 0
        rest, start = len(order) - min(options.exact, len(order)), options.exact
        for tier, share in enumerate(options.columns[:-1], start=1):
            stop = start + int(rest * share)
            labels[order[start:stop]] = tier
            start = stop
        return labels

    def ranks(self, sizes: list[int], size: int) -> list[int]:
        exact, left = min(size, self.options.exact), max(0, size - self.options.exact)
        return [exact, *(int(left * share) for share in self.options.ranks)]
