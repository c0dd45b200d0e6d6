"""`low_rank`: W (m, n) as two factors, left (m, k) and right (k, n), for any metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from winnow.models.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class LowRank(Structure):
    """The best rank-k map in the metric: left = U_k, right = U_k^T W, with U_k the leading left singular vectors of W C^{1/2}
    (R^{-1/2} U_k and U_k^T R^{1/2} W, with U_k of R^{1/2} W C^{1/2}, in a metric that also weighs outputs)."""

    reference = "Eckart and Young 1936; weighted as in SVD-LLM, arXiv 2403.07378"
    stores = "left (m, k), right (k, n)"
    formula = "k (m + n)"
    bias_name = "left.bias"
    predicts = True
    timed = True

    class Options(StructureOptions):
        kind: Literal["low_rank"]

    def refits(self) -> bool:
        return True

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return size * sum(group[0].shape)

    def fit(self, problem: Problem, largest: int) -> Fit:
        from winnow.numerics.linalg import leading_directions

        (weight,) = problem.weights.values()
        found = leading_directions(weight, problem.columns(), problem.precision, problem.rows(), largest)
        factors = {"left": found.left, "right": found.right}
        return Fit(factors, found.error[: largest + 1], found.spectrum)

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        from winnow.numerics.linalg import truncation_errors

        ((name, weight),) = problem.weights.items()
        grams = problem.sites[name]["gram"], problem.outputs[name]["gradient_gram"]
        return truncation_errors(weight, tensors["left"].double(), tensors["right"].double(), *grams) / 2

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        (m, n) = group[0].shape
        return {group[0].module: {"kind": self.kind(), "out": m, "in": n, "rank": size}}

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        left, right = tensors["left"][:, :size], tensors["right"][:size]
        own = {"weight": left.new_empty(0), "left.weight": left, "right.weight": right}
        return {module: Part(layout, own) for module, layout in self.layouts(group, size).items()}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import LowRankLinear, has_bias

        return LowRankLinear(layout["in"], layout["out"], layout["rank"], has_bias(dense))
