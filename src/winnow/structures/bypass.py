"""`bypass`: the leading directions of W as two factors, and the remainder of W in any other structure and metric."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.metrics.base import METRICS, MetricOptions
from winnow.models.architectures import Matrix
from winnow.structures.base import AnyStructure, Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.calibration.clusters import Clustering

if TYPE_CHECKING:
    AnyMetric = MetricOptions
else:
    AnyMetric = METRICS.union


class Bypass(Structure):
    """W = W_r + remainder: W_r of rank r in the method's metric, the remainder stored by `remainder` in its own metric.

    With `low_rank` as remainder and one metric for both, this is exactly rank r + k (T6): a bypass can only help if the metrics
    differ.
    """

    reference = "FFN SVD/PCA with residual bypass (HyperTensor Paper VIII)"
    stores = "kept.left (m, r), kept.right (r, n), and what the remainder stores"
    formula = "r (m + n) + remainder"
    bias_name = "kept.left.bias"

    class Options(StructureOptions):
        kind: Literal["bypass"]
        kept: int = Field(8, ge=1, description="number r of separate leading directions")
        kept_fraction: float | None = Field(
            None, gt=0, lt=1, description="r as a share of the smaller side of each matrix, instead of `kept`"
        )
        remainder: AnyStructure = Field(  # resolved by the registry, which knows them all
            default_factory=lambda: {"kind": "low_rank"}, validate_default=True, description="structure of the remainder"
        )
        remainder_metric: AnyMetric | None = Field(None, description="metric of the remainder; the method's own when absent")

        @model_validator(mode="after")
        def _of_matrices(self) -> Bypass.Options:
            from winnow.structures.base import STRUCTURES

            if self.kept_fraction is not None and self.kept != type(self).model_fields["kept"].default:
                raise ValueError("give either `kept` or `kept_fraction`, not both")
            if STRUCTURES[self.remainder.kind].bias_name is None:
                raise ValueError(f"{self.remainder.kind} replaces a whole FFN, so it cannot store the remainder of a matrix")
            if STRUCTURES[self.remainder.kind].optimised_at_size:
                raise ValueError(f"{self.remainder.kind} shares tensors between layers by name, so it cannot be a remainder")
            return self

    options: Options

    @property
    def inner(self) -> Structure:
        from winnow.structures.base import STRUCTURES

        return STRUCTURES.build(self.options.remainder.model_dump())

    def needs(self) -> tuple[str, ...]:
        own = METRICS.build(self.options.remainder_metric.model_dump()).needs if self.options.remainder_metric else ()
        return (*own, *self.inner.needs())

    def refits(self) -> bool:
        return self.options.remainder.kind == "rounded"

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        return self.inner.groups(matrices)

    def clustering(self) -> Clustering | None:
        return self.inner.clustering()

    def control(self) -> StructureOptions | None:
        control = self.inner.control()
        return self.options.model_copy(update={"remainder": control}) if control else None

    def limit(self, group: list[Matrix]) -> int:
        return self.inner.limit(group)

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return sum(self._kept(m) * sum(m.shape) for m in group) + self.inner.numbers(group, size, _rest(tensors))

    def whole(self, group: list[Matrix]) -> int:
        return self.inner.whole(group)

    def largest(self, group: list[Matrix]) -> int:
        return self.inner.largest(group) if self.inner.clustering() else super().largest(group)

    def metric_of_error(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        return self.inner.metric_of_error(problem)

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return self.inner.index_bytes(group, size)

    def _kept(self, matrix: Matrix) -> int:
        share = self.options.kept_fraction
        return min(max(1, round(share * min(matrix.shape))) if share else self.options.kept, *matrix.shape)

    def fit(self, problem: Problem, largest: int) -> Fit:
        from winnow.numerics.linalg import leading_directions

        kept: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for m in problem.group:
            weight, r = problem.weights[m.name], self._kept(m)
            found = leading_directions(weight, problem.columns([m]), problem.precision, problem.rows([m]), r)
            left, right = found.left, found.right
            kept |= {f"{m.name}.kept.left": left, f"{m.name}.kept.right": right}
            rest[m.name] = weight - left @ right
        other = self.options.remainder_metric
        metric = METRICS.build(other.model_dump()) if other else problem.metric
        inner = self.inner.fit(replace(problem, weights=rest, metric=metric, metric_weights=problem.weights), largest)
        return Fit({**kept, **{f"rest.{name}": t for name, t in inner.tensors.items()}}, inner.error, inner.spectrum)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        inner = self.inner.stored(group, _rest(tensors), size)
        found = {}
        for m in group:
            left, right = (tensors[f"{m.name}.kept.{side}"] for side in ("left", "right"))
            own = {"kept.left.weight": left, "kept.right.weight": right, "weight": left.new_empty(0)}
            own["kept.weight"] = left.new_empty(0)
            rest = inner[m.module]
            if "basis_of" in rest.layout:
                rest.layout["basis_of"] += ".rest"
            layout = {"kind": self.kind(), "out": m.shape[0], "in": m.shape[1], "rank": self._kept(m), "rest": rest.layout}
            found[m.module] = Part(layout, {**own, **{f"rest.{name}": t for name, t in rest.tensors.items()}})
        return found

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import LowRankLinear, SumLinear, has_bias
        from winnow.structures.base import STRUCTURES

        kept = LowRankLinear(layout["in"], layout["out"], layout["rank"], has_bias(dense))
        without_bias = nn.Linear(1, 1, bias=False)
        return SumLinear(kept, STRUCTURES[layout["rest"]["kind"]].module(layout["rest"], without_bias))

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        from winnow.structures.base import STRUCTURES

        return STRUCTURES[layout["rest"]["kind"]].share(model, f"{name}.rest", layout["rest"])


def _rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the remainder's fit."""
    return {name.removeprefix("rest."): t for name, t in tensors.items() if name.startswith("rest.")}
