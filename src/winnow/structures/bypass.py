"""`bypass`: the leading directions of W as two factors, and the remainder of W in any other structure and metric."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.metrics.base import METRICS, MetricOptions
from winnow.models.architectures import Matrix
from winnow.numerics.operations import EIGEN, Operations
from winnow.structures.base import AnyStructure, Fit, Part, Problem, Runtime, Structure, StructureOptions
from winnow.structures.parts import (
    Factors,
    Seen,
    below,
    factors_of,
    named_below,
    of_form,
    product_layouts,
    product_module,
    product_tensors,
    restored_product,
    round_factors,
    stored_product,
)
from winnow.structures.rounded import Rounded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.calibration.clusters import Clustering

if TYPE_CHECKING:
    AnyMetric = MetricOptions
else:
    AnyMetric = METRICS.union

log = logging.getLogger(__name__)
# How the factors of the leading directions are rounded, in forms with a scale for every row.
FACTORS = Rounded(
    Rounded.Options(
        kind="rounded", bits=[8], group=None, grids=["full"], scales="unbiased", rounding="feedback", rotations=["none"]
    )
)


class Bypass(Structure):
    """W = W_r + remainder: W_r of rank r in the method's metric, the remainder stored by `remainder` in its own metric.

    With `low_rank` as remainder and one metric for both, this is exactly rank r + k (T6): a bypass can only help if the metrics
    differ. With a `rounded` remainder it is W = Q + L A. `order: remainder_first` with one round fits L A to the error of
    rounding W, as in LQER and QERA; with several rounds, rounding and L A are fitted in turn to what the other leaves, as in
    CALDERA, and the pair with the lowest error in the method's metric is stored.
    """

    reference = "FFN SVD/PCA with residual bypass (HyperTensor Paper VIII); LQER, arXiv 2402.02446; CALDERA, arXiv 2405.18886"
    stores = "kept.left (m, r), kept.right (r, n), and what the remainder stores"
    formula = "r (m + n) + remainder"
    bias_name = "kept.left.bias"
    predicts = True  # if its remainder does
    timed = True

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

        order: Literal["kept_first", "remainder_first"] = Field(
            "kept_first",
            description="which part is fitted to W, the other to what it leaves; remainder_first is for a `rounded` remainder",
        )
        rounds: int = Field(1, ge=1, le=50, description="how often both parts are fitted; more than 1 for a `rounded` remainder")
        kept_bits: int | None = Field(
            None, ge=2, le=8, description="bits of the numbers of the leading directions, as in `rounded_low_rank`; null: as W"
        )

        @property
        def in_turn(self) -> bool:
            """Whether the leading directions depend on the remainder, so that every size has its own."""
            return self.order == "remainder_first" or self.rounds > 1

        @model_validator(mode="after")
        def _of_matrices(self) -> Bypass.Options:
            from winnow.structures.base import STRUCTURES

            if self.in_turn and self.remainder.kind != "rounded":
                raise ValueError(
                    f"`order: remainder_first` and `rounds` are for a remainder of the kind rounded, not {self.remainder.kind}"
                )
            if self.kept_fraction is not None and self.kept != type(self).model_fields["kept"].default:
                raise ValueError("give either `kept` or `kept_fraction`, not both")
            if STRUCTURES[self.remainder.kind].bias_name is None:
                raise ValueError(f"{self.remainder.kind} replaces a whole FFN, so it cannot store the remainder of a matrix")
            if STRUCTURES[self.remainder.kind].optimised_at_size:
                raise ValueError(f"{self.remainder.kind} shares tensors between layers by name, so it cannot be a remainder")
            return self

    options: Options

    def __init__(self, options: StructureOptions):
        super().__init__(options)
        self.predicts, self.timed = self.inner.predicts, self.inner.timed

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
        kept = 0 if self.options.kept_bits else sum(self._kept(m) * sum(m.shape) for m in group)
        return kept + self.inner.numbers(group, size, below(tensors, "rest."))

    def rounds(self) -> bool:
        return self.options.kept_bits is not None or self.inner.rounds()

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        return super().runs(group, size, runtime) and self.inner.runs(group, size, runtime)

    def whole(self, group: list[Matrix]) -> int:
        return self.inner.whole(group)

    def largest(self, group: list[Matrix]) -> int:
        return self.inner.largest(group) if self.inner.clustering() else super().largest(group)

    def metric_of_error(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        return self.inner.metric_of_error(problem)

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        kept = sum(self._form(m).bytes for m in group) if self.options.kept_bits else 0
        return kept + self.inner.index_bytes(group, size)

    def _form(self, matrix: Matrix) -> Factors:
        """The forms of rounded factors: a scale for every row."""
        return factors_of(*matrix.shape, self._kept(matrix), self.options.kept_bits or 8, "full", None)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """That of the remainder in every round, and the leading directions of every size and round."""
        memory, operations, cached = self.inner.work(group, (*needs, *self.needs()))
        times = self.inner.limit(group) if self.options.in_turn else 1
        operations *= self.options.rounds
        for m, n in (matrix.shape for matrix in group):
            roots = m**3 if "gradient_gram" in needs else 0
            each = Operations(products=2.0 * m * n * (m + n), decompositions=EIGEN * (min(m, n) ** 3 + roots))
            operations += each * (self.options.rounds * times)
        kept = sum(self._kept(m) * sum(m.shape) for m in group) * (1.0 if self.options.kept_bits else 4.0)
        return max(memory, super().work(group, needs)[0]), operations, cached + kept * times

    def predicting(self, group: list[Matrix]) -> float:
        return self.inner.predicting(group)

    def _kept(self, matrix: Matrix) -> int:
        share = self.options.kept_fraction
        return min(max(1, round(share * min(matrix.shape))) if share else self.options.kept, *matrix.shape)

    def fit(self, problem: Problem, largest: int) -> Fit:
        if self.options.in_turn:
            return self._fit_in_turn(problem)
        kept: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for m in problem.group:
            tensors, product = self._leading(problem, m, problem.weights[m.name])
            kept |= named_below(tensors, f"{m.name}.kept.")
            rest[m.name] = problem.weights[m.name] - product
        inner = self.inner.fit(self._of_rest(problem, rest), largest)
        return Fit({**kept, **named_below(inner.tensors, "rest.")}, inner.error, inner.spectrum)

    def _leading(self, problem: Problem, matrix: Matrix, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(tensors of the leading directions of `weight` in the method's metric, their product)"""
        from winnow.numerics.linalg import leading_directions

        columns, rows = problem.columns([matrix]), problem.rows([matrix])
        found = leading_directions(weight, columns, problem.precision, rows, self._kept(matrix))
        if not self.options.kept_bits:
            return {"left": found.left, "right": found.right}, found.left @ found.right
        form = self._form(matrix)
        product = round_factors(FACTORS, matrix, weight, found.left, found.right, form, Seen(columns, rows), 1)
        return product_tensors(product, ""), product.matrix

    def _of_rest(self, problem: Problem, rest: dict[str, Tensor]) -> Problem:
        other = self.options.remainder_metric
        metric = METRICS.build(other.model_dump()) if other else problem.metric
        return replace(problem, weights=rest, metric=metric, metric_weights=problem.weights)

    def _fit_in_turn(self, problem: Problem) -> Fit:
        """A `rounded` remainder: every form has leading directions of its own, and both are fitted to what the other leaves."""
        import torch

        from winnow.numerics.linalg import weighted_error

        ((matrix, weight),) = ((m, problem.weights[m.name]) for m in problem.group)
        inner, first_kept = self.inner, self.options.order == "kept_first"
        assert isinstance(inner, Rounded)
        metric = problem.columns(), problem.rows()
        errors = [weighted_error(weight, *metric)]
        stored: dict[str, Tensor] = {}
        start = self._leading(problem, matrix, weight) if first_kept else ({}, torch.zeros_like(weight))
        for size, form in enumerate(inner.forms(*weight.shape), start=1):
            one, (kept, product), found = of_form(inner, form), start, []
            for number in range(self.options.rounds):
                rest = one.fit(self._of_rest(problem, {matrix.name: weight - product}), 1).tensors
                left = weight - one.restored(rest, 1, weight.shape[1])
                if kept:
                    found.append((float(weighted_error(left - product, *metric)), kept, rest))
                if number + 1 < self.options.rounds or not first_kept:
                    kept, product = self._leading(problem, matrix, left)
                    found.append((float(weighted_error(left - product, *metric)), kept, rest))
            error, kept, rest = min(found, key=lambda state: state[0])
            errors.append(weight.new_tensor(error))
            stored |= named_below(kept, f"{size}.kept.") | named_below(rest, f"{size}.rest.")
            log.info(
                "%s: %d directions beside %d bits: error %.3g at first, %.3g stored",
                matrix.name, self._kept(matrix), form.bits, found[0][0], error,
            )  # fmt: skip
        return Fit(stored, torch.stack(errors), errors[0].sqrt()[None])

    def _at(self, matrix: Matrix, tensors: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(tensors of the leading directions of a matrix, tensors of the remainder's fit) for `size`."""
        if self.options.in_turn:
            return below(tensors, f"{size}.kept."), below(tensors, f"{size}.rest.")
        return below(tensors, f"{matrix.name}.kept."), below(tensors, "rest.")

    def _rest_of(self, matrix: Matrix, size: int) -> tuple[Structure, int]:
        """(the structure of the remainder, its size)"""
        inner = self.inner
        if self.options.in_turn and isinstance(inner, Rounded):
            return of_form(inner, inner.forms(*matrix.shape)[size - 1]), 1
        return inner, size

    def _product(self, matrix: Matrix, kept: dict[str, Tensor]) -> Tensor:
        if self.options.kept_bits:
            return restored_product(FACTORS, self._form(matrix), matrix.shape[1], kept)
        return kept["left"].double() @ kept["right"].double()

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        from winnow.numerics.linalg import weighted_error

        ((matrix, weight),) = ((m, problem.weights[m.name]) for m in problem.group)

        def of_rest(size: int) -> Tensor:
            kept, rest = self._at(matrix, tensors, size)
            left = {matrix.name: weight - self._product(matrix, kept)}
            return self._rest_of(matrix, size)[0].predicted(replace(problem, weights=left), rest)

        if not self.options.in_turn:
            return of_rest(0)
        columns, rows = problem.sites[matrix.name]["gram"], problem.outputs[matrix.name]["gradient_gram"]
        sizes = range(1, self.limit(problem.group) + 1)
        return torch.stack([weighted_error(weight, columns, rows) / 2, *(of_rest(size)[1] for size in sizes)])

    def _layout(self, matrix: Matrix, rest: dict[str, Any]) -> dict[str, Any]:
        found = {"kind": self.kind(), "out": matrix.shape[0], "in": matrix.shape[1], "rank": self._kept(matrix), "rest": rest}
        return found | ({"kept": product_layouts(FACTORS, matrix, self._form(matrix))} if self.options.kept_bits else {})

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        rest, own = self._rest_of(group[0], size)
        inner = rest.layouts(group, own)
        return {m.module: self._layout(m, inner[m.module]) for m in group}

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return self.inner.timed_sizes(group, count)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        structure, own_size = self._rest_of(group[0], size)
        inner = structure.stored(group, self._at(group[0], tensors, size)[1], own_size)
        found = {}
        for m in group:
            kept, rest, empty = self._at(m, tensors, size)[0], inner[m.module], torch.empty(0)
            if self.options.kept_bits:
                own = stored_product(FACTORS, m, self._form(m), kept)
            else:
                own = {f"{side}.weight": kept[side] for side in ("left", "right")}
            own = named_below(own, "kept.") | {"weight": empty, "kept.weight": empty}
            if "basis_of" in rest.layout:
                rest.layout["basis_of"] += ".rest"
            found[m.module] = Part(self._layout(m, rest.layout), own | named_below(rest.tensors, "rest."))
        return found

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import LowRankLinear, SumLinear, has_bias
        from winnow.structures.base import STRUCTURES

        kept: Any = LowRankLinear(layout["in"], layout["out"], layout["rank"], has_bias(dense))
        if "kept" in layout:
            kept = product_module(layout["kept"], dense)
        without_bias = nn.Linear(1, 1, bias=False)
        return SumLinear(kept, STRUCTURES[layout["rest"]["kind"]].module(layout["rest"], without_bias))

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        from winnow.structures.base import STRUCTURES

        return STRUCTURES[layout["rest"]["kind"]].share(model, f"{name}.rest", layout["rest"])
