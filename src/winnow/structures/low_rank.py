"""`low_rank`: W (m, n) as two factors, left (m, k) and right (k, n), for any metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from winnow.architectures import Matrix
from winnow.structures.base import Fit, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class LowRank(Structure):
    """The best rank-k map in the metric: left = U_k, right = U_k^T W, with U_k the leading left singular vectors of W C^{1/2}."""

    reference = "Eckart and Young 1936; weighted as in SVD-LLM, arXiv 2403.07378"
    stores = "left (m, k), right (k, n): k (m + n)"
    bias_name = "left.bias"

    class Options(StructureOptions):
        kind: Literal["low_rank"]

    def largest(self, group: list[Matrix]) -> int:
        (m, n) = group[0].shape
        return (m * n - 1) // (m + n)

    def numbers(self, group: list[Matrix], size: int) -> int:
        return size * sum(group[0].shape)

    def fit(self, problem: Problem, largest: int) -> Fit:
        from winnow.linalg import leading_directions

        (weight,) = problem.weights.values()
        left, spectrum, error = leading_directions(weight, problem.columns(), problem.precision)
        left = left[:, :largest]
        return Fit({"left": left, "right": left.T @ weight}, error[: largest + 1], spectrum)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, dict[str, Tensor]]:
        left, right = tensors["left"][:, :size], tensors["right"][:size]
        return {group[0].module: {"weight": left.new_empty(0), "left.weight": left, "right.weight": right}}

    def layout(self, group: list[Matrix], matrix: Matrix, size: int) -> dict[str, Any]:
        return {"kind": self.kind(), "out": matrix.shape[0], "in": matrix.shape[1], "rank": size}

    @staticmethod
    def module(layout: dict[str, Any], bias: bool) -> nn.Module:
        from winnow.modules import LowRankLinear

        return LowRankLinear(layout["in"], layout["out"], layout["rank"], bias)
