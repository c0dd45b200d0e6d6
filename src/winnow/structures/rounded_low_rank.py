"""`rounded_low_rank`: the two factors of `low_rank`, both rounded to 2 to 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from winnow.models.architectures import Matrix, group_name
from winnow.numerics.operations import EIGEN, NONE, Operations
from winnow.structures.base import Fit, Part, Problem, Runtime, Structure
from winnow.structures.forms import ASCENDING
from winnow.structures.parts import (
    Factors,
    PartOptions,
    Seen,
    below,
    factor_parts,
    factors_of,
    product_layouts,
    product_module,
    product_tensors,
    restored_product,
    round_factors,
    rounder,
    stored_product,
)
from winnow.structures.rounded import Rounded

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
LEAST = 1e-6  # singular values that are split between the factors, as a share of the largest
Share = Annotated[float, Field(gt=0, le=1)]


class RoundedLowRank(Structure):
    """W as left (m, r) right (r, n), both stored like a matrix of `rounded`. The right factor is rounded in the metric that it
    sees, C and left^T R left; the left one is fitted to the rounded right one and rounded in right C right^T and R. Size s is the
    s-th of all pairs of a rank and a form (bits, group, grid) by stored bytes, of those that store less than 16 bits a number."""

    reference = "SVD-LLM with GPTQ, arXiv 2403.07378; in the two-sided metric not published as far as we know"
    stores = "left (m, r) and right (r, n), each as `rounded` stores a matrix"
    formula = "r (m + n) steps, scales as in `rounded`"
    bias_name = "left.bias"
    predicts = True
    timed = True

    class Options(PartOptions):
        kind: Literal["rounded_low_rank"]  # type: ignore[assignment]
        ranks: Annotated[list[Share], ASCENDING] = Field(
            [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0],
            min_length=1,
            description="the ranks to choose from, as shares of the smaller side of a matrix, in ascending order",
        )
        gauge: Literal["orthogonal", "split", "rotated"] = Field(
            "rotated",
            description="which of the pairs of factors with the same product is rounded: orthogonal: columns of left are "
            "orthonormal in the metric of outputs, and the singular values are in right; split: both have the roots of the "
            "singular values, as in SVD-LLM; rotated: orthogonal ones, turned by a random rotation of the directions, so that "
            "error feedback has correlated columns to compensate in",
        )
        rounds: int = Field(
            1, ge=1, le=20, description="how often the factors are fitted to each other and rounded; the best pair is stored"
        )

    options: Options

    @property
    def rounded(self) -> Rounded:
        return rounder(self.options)

    def rounds(self) -> bool:
        return True

    def sizes(self, m: int, n: int) -> list[Factors]:
        """The ranks and forms of sizes 1, 2, ... of a matrix (m, n)."""
        own = self.options
        groups = own.group if isinstance(own.group, list) else [own.group]
        ranks = dict.fromkeys(max(1, round(share * min(m, n))) for share in own.ranks)
        found = (
            factors_of(m, n, rank, bits, grid, group)
            for rank in ranks
            for bits in own.bits
            for group in groups
            for grid in own.grids
        )
        return sorted((f for f in dict.fromkeys(found) if f.bytes < 2 * m * n), key=lambda f: f.bytes)

    def limit(self, group: list[Matrix]) -> int:
        return len(self.sizes(*group[0].shape))

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return 0  # as of `rounded`: `index_bytes` counts everything

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return self.sizes(*group[0].shape)[size - 1].bytes

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        form = self.sizes(*group[0].shape)[size - 1]
        if runtime == "torch":
            return all(one.runs([part], 1, runtime) for part, one in factor_parts(self.rounded, group[0], form).values())
        return super().runs(group, size, runtime)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """The factors of all ranks, and the rounding of each pair."""
        m, n = group[0].shape
        memory, operations, cached = 80.0 * m * n, self._factoring(m, n), 0.0
        for form in self.sizes(m, n):
            held, rounding, kept = self._work(group, needs, form)
            memory, operations, cached = max(memory, held), operations + rounding, cached + kept
        return memory, operations, cached

    def again(self, group: list[Matrix], needs: tuple[str, ...]) -> Operations:
        m, n = group[0].shape
        return self._factoring(m, n) + max((self._work(group, needs, form)[1] for form in self.sizes(m, n)), default=NONE)

    def _factoring(self, m: int, n: int) -> Operations:
        return Operations(products=2.0 * m * n * n, decompositions=EIGEN * min(m, n) ** 3)

    def _work(self, group: list[Matrix], needs: tuple[str, ...], form: Factors) -> tuple[float, Operations, float]:
        """Of the rounding of one pair."""
        (m, n), memory, operations, cached = group[0].shape, 0.0, NONE, 0.0
        fitting = 4.0 * form.rank * m * n + 2.0 * form.rank * (n * n + m * m) + 2.0 * m * n * (m + n)
        for part, one in factor_parts(self.rounded, group[0], form).values():
            held, rounding, kept = one.work([part], needs)
            memory, cached = max(memory, held), cached + kept
            operations += (rounding + Operations(products=fitting)) * self.options.rounds
        return memory, operations, cached

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        stored, errors, spectrum = self._fitted(problem, range(1, self.limit(problem.group) + 1))
        return Fit(stored, torch.stack([errors[size] for size in range(len(errors))]), spectrum)

    def fit_at(self, problem: Problem, size: int) -> dict[str, Tensor]:
        return self._fitted(problem, [size])[0]

    def _fitted(self, problem: Problem, asked: Collection[int]) -> tuple[dict[str, Tensor], dict[int, Tensor], Tensor]:
        """(tensors of the sizes asked for, {size: error} of them and of size 0, spectrum)"""
        from winnow.numerics.linalg import leading_directions, weighted_error

        ((matrix, weight),) = ((m, problem.weights[m.name]) for m in problem.group)
        columns, rows = self.metric_of_error(problem)
        sizes, rounded = self.sizes(*weight.shape), self.rounded
        most = max((form.rank for form in sizes), default=1)
        found = leading_directions(weight, columns, problem.precision, rows, most)
        errors = {0: weighted_error(weight, columns, rows)}
        stored: dict[str, Tensor] = {}
        for size in asked:
            form = sizes[size - 1]
            pair = self._gauged(found.left[:, : form.rank], found.right[: form.rank], found.spectrum[: form.rank])
            product = round_factors(rounded, matrix, weight, *pair, form, Seen(columns, rows), self.options.rounds)
            errors[size] = weighted_error(weight - product.matrix, columns, rows)
            stored |= product_tensors(product, f"{size}.")
            log.info(
                "%s: rank %d, %d bits: error %.3g without rounding, %.3g after the first round, %.3g stored",
                group_name(problem.group), form.rank, form.left.bits, float(found.error[form.rank]), product.first, product.error,
            )  # fmt: skip
        return stored, errors, found.spectrum

    def _gauged(self, left: Tensor, right: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """(left M, M^-1 right) of the gauge, for left of orthonormal columns."""
        import torch

        if self.options.gauge == "split":
            root = (spectrum / spectrum.max()).clamp(min=LEAST).sqrt() if spectrum.max() > 0 else torch.ones_like(spectrum)
            return left * root, right / root[:, None]
        if self.options.gauge == "rotated":
            normal = torch.randn(len(right), len(right), generator=torch.Generator().manual_seed(0), dtype=right.dtype)
            turn = torch.linalg.qr(normal).Q.to(right.device)
            signs = torch.where(left.sum(0) < 0, -1.0, 1.0).to(left)  # those of an eigensolver are arbitrary
            return left * signs @ turn, turn.T @ (signs[:, None] * right)
        return left, right

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        from winnow.numerics.linalg import weighted_error

        ((name, weight),) = problem.weights.items()
        columns, rows = problem.sites[name]["gram"], problem.outputs[name]["gradient_gram"]
        errors, n = [weighted_error(weight, columns, rows)], weight.shape[1]
        for size, form in enumerate(self.sizes(*weight.shape), start=1):
            kept = restored_product(self.rounded, form, n, below(tensors, f"{size}."))
            errors.append(weighted_error(weight - kept, columns, rows))
        return torch.stack(errors) / 2

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        (m, n), form = group[0].shape, self.sizes(*group[0].shape)[size - 1]
        parts = product_layouts(self.rounded, group[0], form)
        return {group[0].module: {"kind": self.kind(), "out": m, "in": n, **parts}}

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return list(range(1, self.largest(group) + 1))  # as of `rounded`

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        form = self.sizes(*group[0].shape)[size - 1]
        own = stored_product(self.rounded, group[0], form, below(tensors, f"{size}."))
        return {module: Part(layout, {**own, "weight": torch.empty(0)}) for module, layout in self.layouts(group, size).items()}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        return product_module(layout, dense)
