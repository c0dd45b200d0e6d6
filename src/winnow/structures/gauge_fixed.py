"""`gauge_fixed`: the rank-k map of `low_rank` in k (m + n - k) numbers: k rows, and the others as combinations of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from winnow.models.architectures import Matrix
from winnow.numerics.operations import Operations
from winnow.structures.base import Part, StructureOptions
from winnow.structures.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor, nn


class GaugeFixed(LowRank):
    """W_k = left right does not change with left M, M^{-1} right; with M^{-1} = left[p] for k rows p, these rows of left become
    the identity and are not stored. The rows are chosen by pivoting, which keeps the coefficients of the others small."""

    reference = "two factors without their k^2 redundant numbers (not published as far as we know)"
    stores = "right (k, n): k rows of W_k; left (m - k, k); order of the rows (m indices)"
    formula = "k (m + n - k)"
    bias_name = "bias"

    class Options(StructureOptions):
        kind: Literal["gauge_fixed"]

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """As in `Structure`; both factors are cached as `low_rank` has them, up to a larger size."""
        memory, operations, _ = super().work(group, needs)
        return memory, operations, 4.0 * self.largest(group) * sum(group[0].shape)

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return size * (sum(group[0].shape) - size)

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return group[0].shape[0] * (2 if group[0].shape[0] < 2**15 else 4)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        from winnow.numerics.linalg import pivot_rows

        left, right = tensors["left"][:, :size].double(), tensors["right"][:size].double()
        rows = pivot_rows(left)
        kept = torch.zeros(len(left), dtype=torch.bool).index_fill(0, rows, True)
        others = (~kept).nonzero().flatten()
        order = torch.cat([rows, others]).argsort()
        coefficients = torch.linalg.solve(left[rows].T, left[others].T).T
        index = torch.int16 if len(left) < 2**15 else torch.int32
        own = {"left.weight": coefficients, "right.weight": left[rows] @ right, "order": order.to(index)}
        own["weight"] = left.new_empty(0)
        return {module: Part(layout, own) for module, layout in self.layouts(group, size).items()}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import RowsLinear, has_bias

        return RowsLinear(layout["in"], layout["out"], layout["rank"], has_bias(dense))
