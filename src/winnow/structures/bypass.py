"""`bypass`: the leading directions of W kept apart as two factors, what is left of W by any other structure and metric."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.architectures import Matrix
from winnow.metrics import AnyMetric, metric_of
from winnow.structures.base import AnyStructure, Fit, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Bypass(Structure):
    """W = W_r + remainder: W_r of rank r in the method's metric, the remainder stored by `remainder` in its own metric.

    With `low_rank` as remainder and one metric for both this is rank r + k exactly (T6): a bypass can help only where the
    two differ.
    """

    reference = "FFN SVD/PCA with residual bypass (HyperTensor Paper VIII)"
    stores = "kept.left (m, r), kept.right (r, n), and what the remainder stores: r (m + n) + that"
    bias_name = "kept.left.bias"

    class Options(StructureOptions):
        kind: Literal["bypass"]
        kept: int = Field(8, ge=1, description="directions kept apart, r")
        remainder: AnyStructure = Field(  # resolved by the registry, which knows them all
            default_factory=lambda: {"kind": "low_rank"}, validate_default=True, description="structure of the remainder"
        )
        remainder_metric: AnyMetric | None = Field(None, description="metric of the remainder; the method's own when absent")

    options: Options

    @property
    def inner(self) -> Structure:
        from winnow.structures import structure_of

        return structure_of(self.options.remainder.model_dump())

    def needs(self) -> tuple[str, ...]:
        own = metric_of(self.options.remainder_metric.model_dump()).needs if self.options.remainder_metric else ()
        return (*own, *self.inner.needs())

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        return self.inner.groups(matrices)

    def numbers(self, group: list[Matrix], size: int) -> int:
        return sum(self._kept(m) * sum(m.shape) for m in group) + self.inner.numbers(group, size)

    def largest(self, group: list[Matrix]) -> int:
        dense = sum(m.shape[0] * m.shape[1] for m in group)
        sizes = range(1, self.inner.largest(group) + 1)
        return max((size for size in sizes if self.numbers(group, size) < dense), default=0)

    def index_bytes(self, group: list[Matrix]) -> int:
        return self.inner.index_bytes(group)

    def _kept(self, matrix: Matrix) -> int:
        return min(self.options.kept, *matrix.shape)

    def fit(self, problem: Problem, largest: int) -> Fit:
        from winnow.linalg import leading_directions

        kept: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for m in problem.group:
            weight = problem.weights[m.name]
            columns = problem.metric.columns(weight, problem.sites.get(m.name, {}))
            left = leading_directions(weight, columns, problem.precision)[0][:, : self._kept(m)]
            right = left.T @ weight
            kept |= {f"{m.name}.kept.left": left, f"{m.name}.kept.right": right}
            rest[m.name] = weight - left @ right
        other = self.options.remainder_metric
        metric = metric_of(other.model_dump()) if other else problem.metric
        inner = self.inner.fit(replace(problem, weights=rest, metric=metric, metric_weights=problem.weights), largest)
        return Fit({**kept, **{f"rest.{name}": t for name, t in inner.tensors.items()}}, inner.error, inner.spectrum)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, dict[str, Tensor]]:
        rest = {name.removeprefix("rest."): t for name, t in tensors.items() if name.startswith("rest.")}
        inner = self.inner.stored(group, rest, size)
        found = {}
        for m in group:
            left, right = (tensors[f"{m.name}.kept.{side}"] for side in ("left", "right"))
            own = {"kept.left.weight": left, "kept.right.weight": right, "weight": left.new_empty(0)}
            own["kept.weight"] = left.new_empty(0)
            found[m.module] = {**own, **{f"rest.{name}": t for name, t in inner[m.module].items()}}
        return found

    def layout(self, group: list[Matrix], matrix: Matrix, size: int) -> dict[str, Any]:
        inner = self.inner.layout(group, matrix, size)
        if "basis_of" in inner:
            inner["basis_of"] += ".rest"
        own = {"kind": self.kind(), "out": matrix.shape[0], "in": matrix.shape[1], "rank": self._kept(matrix)}
        return {**own, "rest": inner}

    @staticmethod
    def module(layout: dict[str, Any], bias: bool) -> nn.Module:
        from winnow.modules import LowRankLinear, SumLinear
        from winnow.structures import STRUCTURES

        kept = LowRankLinear(layout["in"], layout["out"], layout["rank"], bias)
        return SumLinear(kept, STRUCTURES[layout["rest"]["kind"]].module(layout["rest"], False))

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        from winnow.structures import STRUCTURES

        return STRUCTURES[layout["rest"]["kind"]].share(model, f"{name}.rest", layout["rest"])
