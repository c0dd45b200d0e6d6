"""`cluster`: clusters of columns or rows of W, each with its own low-rank map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from winnow.calibration.clusters import Clustering, site_of
from winnow.models.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Cluster(Structure):
    """Per-cluster SVD: at size k a cluster with n_c of the n channels has rank k_c = ceil(k n_c / n). A block is stored dense if
    its factors would be larger. The metric is that of the blocks, without products between clusters of columns."""

    reference = "per-cluster column SVD, HyperTensor Paper VII"
    stores = "per cluster left (m, k_c) and right (k_c, n_c), or the dense block; order of the channels (n indices)"
    formula = "sum_c min(k_c (m + n_c), m n_c)"
    bias_name = "bias"

    class Options(StructureOptions, Clustering):
        kind: Literal["cluster"]

    options: Options

    def clustering(self) -> Clustering | None:
        return Clustering(**{name: getattr(self.options, name) for name in Clustering.model_fields})

    def control(self) -> StructureOptions | None:
        return None if self.options.by == "random" else self.options.model_copy(update={"by": "random"})

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        return [[m] for m in matrices if not self.options.needs() or site_of(self.options, m) is not None]

    def on_rows(self, matrix: Matrix) -> bool:
        return self.options.on_rows(matrix)

    def labels(self, problem: Problem) -> Tensor:
        """(channels,): the cluster of every channel of the group's matrix."""
        return problem.labels[problem.group[0].name]

    def ranks(self, sizes: list[int], size: int) -> list[int]:
        """The rank of every cluster from its number of channels."""
        return [math.ceil(size * count / sum(sizes)) for count in sizes]

    def limit(self, group: list[Matrix]) -> int:
        return group[0].shape[0 if self.on_rows(group[0]) else 1]

    def whole(self, group: list[Matrix]) -> int:
        return min(group[0].shape)

    def largest(self, group: list[Matrix]) -> int:
        return self.limit(group)  # what is stored depends on the clusters

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return self.limit(group) * (2 if self.limit(group) < 2**15 else 4)

    def blocks(self, matrix: Matrix, sizes: list[int], size: int) -> list[tuple[int, int, int | None]]:
        """(outputs, inputs, rank or None for dense) of every cluster."""
        (m, n), found = matrix.shape, []
        for count, rank in zip(sizes, self.ranks(sizes, size), strict=True):
            shape = (count, n) if self.on_rows(matrix) else (m, count)
            found.append((*shape, None if rank * sum(shape) >= shape[0] * shape[1] else rank))
        return found

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        blocks = self.blocks(group[0], tensors["sizes"].tolist(), size)
        return sum(m * n if rank is None else rank * (m + n) for m, n, rank in blocks)

    def metric_of_error(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        labels, (columns, rows) = self.labels(problem), super().metric_of_error(problem)
        same = (labels[:, None] == labels).to(columns.device)
        if self.on_rows(problem.group[0]):
            return columns, rows * same if rows is not None and rows.dim() == 2 else rows
        return columns * same if columns.dim() == 2 else columns, rows

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.linalg import leading_directions

        (weight,), (matrix,) = problem.weights.values(), problem.group
        labels = self.labels(problem).to(weight.device)
        columns, rows = problem.columns(), problem.rows()
        order = labels.argsort(stable=True)
        sizes = labels.bincount()
        tensors, spectra, tails = {"order": order.to(torch.int32), "sizes": sizes}, [], []
        for cluster, channels in enumerate(order.split(sizes.tolist())):
            if self.on_rows(matrix):
                block, c, r = weight[channels], columns, _part(rows, channels)
            else:
                block, c, r = weight[:, channels], _part(columns, channels), rows
            found = leading_directions(block, c, problem.precision, r)
            tensors |= {f"{cluster}.left": found.left, f"{cluster}.right": found.right}
            spectra.append(found.spectrum)
            tails.append(found.error)
        error = torch.zeros(largest + 1, dtype=torch.float64)
        for size in range(largest + 1):
            for (_, _, rank), tail in zip(self.blocks(matrix, sizes.tolist(), size), tails, strict=True):
                error[size] += 0.0 if rank is None else float(tail[rank])
        return Fit(tensors, error, torch.cat(spectra).sort(descending=True).values)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        from winnow.numerics.modules import index_dtype

        (matrix,) = group
        blocks, order = self.blocks(matrix, tensors["sizes"].tolist(), size), tensors["order"].long()
        kept = {"order": (order.argsort() if self.on_rows(matrix) else order).to(index_dtype(len(order)))}
        for cluster, (_, _, rank) in enumerate(blocks):
            left, right = tensors[f"{cluster}.left"], tensors[f"{cluster}.right"]
            if rank is None:
                kept[f"{cluster}.weight"] = left @ right
            elif rank:
                kept |= {f"{cluster}.left.weight": left[:, :rank], f"{cluster}.right.weight": right[:rank]}
                kept[f"{cluster}.weight"] = left.new_empty(0)
        (m, n), axis = matrix.shape, "rows" if self.on_rows(matrix) else "columns"
        layout = {"kind": self.kind(), "axis": axis, "out": m, "in": n, "blocks": [list(b) for b in blocks]}
        return {matrix.module: Part(layout, {**kept, "weight": tensors["0.left"].new_empty(0)})}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import ConcatLinear, Constant, LowRankLinear, SplitLinear, has_bias

        parts: dict[str, nn.Module] = {}
        rows = layout["axis"] == "rows"
        if sum(block[0 if rows else 1] for block in layout["blocks"]) != layout["out" if rows else "in"]:
            raise ValueError("the shapes of its blocks do not add up to the matrix")
        for cluster, (m, n, rank) in enumerate(layout["blocks"]):
            if rank is None:
                parts[str(cluster)] = nn.Linear(n, m, bias=False)
            else:
                parts[str(cluster)] = LowRankLinear(n, m, rank, False) if rank else Constant(m, 0.0)
        bias = layout["out"] if has_bias(dense) else 0
        if rows:
            return ConcatLinear(parts, layout["out"], bias)
        return SplitLinear(parts, [n for _, n, _ in layout["blocks"]], True, bias)


def _part(metric: Any, channels: Tensor) -> Any:
    """The metric of some channels: a part of the diagonal, or a block."""
    if metric is None or metric.dim() == 1:
        return metric if metric is None else metric[channels]
    return metric[channels][:, channels]
