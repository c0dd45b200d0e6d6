"""Rounding of matrices that are parts of other structures: factors, kept neurons, and what a product of factors leaves.

Every part is rounded by `rounded`, with all of its options, in the metric that the part sees.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from winnow.models.architectures import Matrix
from winnow.numerics.grids import Form
from winnow.structures.base import Part, Problem
from winnow.structures.forms import Bits
from winnow.structures.rounded import Grid, Rounded

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
# Of least squares for a factor that is rounded afterwards, as a share of the mean diagonal: without it, directions of little
# energy get large coefficients, and with them the scale of their group.
RIDGE = 0.01


class PartOptions(Rounded.Options):
    """How the parts of another structure are rounded: the options of `rounded` with other defaults."""

    bits: Bits = Field([4], min_length=1, description="bits of a number of every part, 2 to 8, in ascending order")
    group: int | list[int | None] | None = Field(128, description="as of `rounded`; at most a row of each part")
    grids: list[Grid] = Field(["full"], min_length=1, description="as of `rounded`")
    scales: Literal["largest", "searched", "unbiased"] = Field("unbiased", description="as of `rounded`")
    rounding: Literal["nearest", "feedback"] = Field("feedback", description="as of `rounded`")
    rotations: list[Literal["none"]] = Field(["none"], description="none: parts are not rotated")  # type: ignore[assignment]


@dataclass(frozen=True)
class Seen:
    """The metric that a part sees: C and R as given, in place of a `Metric` that computes them."""

    c: Tensor
    r: Tensor | None

    def columns(self, weight: Tensor, site: dict[str, Tensor]) -> Tensor:
        return self.c

    def rows(self, output: dict[str, Tensor]) -> Tensor | None:
        return self.r


class Stored(NamedTuple):
    """A rounded part: the tensors of its fit, and the matrix that they are, in float64."""

    tensors: dict[str, Tensor]
    matrix: Tensor


def rounder(options: Any) -> Rounded:
    """`rounded` with the options that another structure has of it."""
    return Rounded(Rounded.Options(**{"kind": "rounded"} | {key: getattr(options, key) for key in FIELDS}))


FIELDS = [key for key in Rounded.Options.model_fields if key != "kind"]


def of_form(rounded: Rounded, form: Form) -> Rounded:
    """The same with one form, which is its size 1."""
    only = {"bits": [form.bits], "group": form.group, "grids": [form.grid], "rotations": [form.rotation]}
    return Rounded(rounded.options.model_copy(update=only))


def part_of(matrix: Matrix, name: str, shape: tuple[int, int]) -> Matrix:
    """A part (out, in) of a matrix, as a matrix of its own below the module."""
    return replace(matrix, module=f"{matrix.module}.{name}", shape=shape, bias=False)


def rounded_part(matrix: Matrix, rounded: Rounded, weight: Tensor, columns: Tensor, rows: Tensor | None) -> Stored:
    """`weight` (m, n) by a `rounded` of one form in the metric C = `columns`, R = `rows`."""
    (tensors,) = rounded_forms(matrix, rounded, weight, columns, rows).values()
    return Stored(tensors, rounded.restored(tensors, 1, weight.shape[1]))


def rounded_forms(
    matrix: Matrix, rounded: Rounded, weight: Tensor, columns: Tensor, rows: Tensor | None, asked: Collection[Form] | None = None
) -> dict[Form, dict[str, Tensor]]:
    """The same for all forms of a `rounded` at once, or those `asked` for, which takes less time: the tensors of each, with the
    names of size 1."""
    part = replace(matrix, shape=(weight.shape[0], weight.shape[1]))
    metric: Any = Seen(columns, rows)
    sizes = {size: form for size, form in enumerate(rounded.forms(*part.shape), start=1) if asked is None or form in asked}
    tensors, _ = rounded.fitted(Problem([part], {part.name: weight}, {}, metric), sizes)
    return {form: named_below(below(tensors, f"{size}."), "1.") for size, form in sizes.items()}


def layout_and_tensors(matrix: Matrix, rounded: Rounded, tensors: dict[str, Tensor]) -> Part:
    """What a `rounded` of one form stores of a part."""
    (found,) = rounded.stored([matrix], tensors, 1).values()
    return found


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def named_below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for name, t in tensors.items()}


class Factors(NamedTuple):
    """W (m, n) as left (m, r) right (r, n): the forms of both, and the bytes of all rows."""

    rank: int
    left: Form
    right: Form
    bytes: int


@cache
def factors_of(m: int, n: int, rank: int, bits: int, grid: str, group: int | None) -> Factors:
    left, right = (Form(bits, grid, min(group or width, width)) for width in (rank, n))
    return Factors(rank, left, right, m * left.row_bytes(rank) + rank * right.row_bytes(n))


class Product(NamedTuple):
    """Rounded factors of a matrix, and their squared error in the metric: at first, and of the best."""

    left: Stored
    right: Stored
    first: float
    error: float

    @property
    def matrix(self) -> Tensor:
        return self.left.matrix @ self.right.matrix


def round_factors(
    rounded: Rounded, matrix: Matrix, weight: Tensor, left: Tensor, right: Tensor, form: Factors, seen: Seen, rounds: int
) -> Product:
    """Round `right` (r, n) in the metric C and left^T R left; fit `left` (m, r) to the rounded factor, and round it in right C
    right^T and R. In every further round the right factor is fitted to the left one first. The best pair is returned.

    `left` and `right` are the factors of `weight` without rounding; in the first round they are assumed to be optimal, so that
    left^T R left is diagonal and the rows of `right` do not compensate for each other.
    """
    from winnow.numerics.linalg import weighted_error

    parts = factor_parts(rounded, matrix, form)
    best: Product | None = None
    first = 0.0
    for number in range(rounds):
        weights = left.T @ times(seen.r, left)
        if number:
            right = right + solve(weights, left.T @ times(seen.r, weight - left @ right))
        stored_right = rounded_part(*parts["right"], right, seen.c, weights if number else weights.diagonal())
        right = stored_right.matrix
        moment = times(seen.c, right.T).T  # right C
        left = left + solve(moment @ right.T, moment @ (weight - left @ right).T).T
        stored_left = rounded_part(*parts["left"], left, moment @ right.T, seen.r)
        left = stored_left.matrix
        error = float(weighted_error(weight - left @ right, seen.c, seen.r))
        first = first if number else error
        if best is None or error < best.error:
            best = Product(stored_left, stored_right, first, error)
    assert best is not None
    return best


def times(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """A full, diagonal or missing (identity) metric times a matrix."""
    if metric is None:
        return matrix
    return metric[:, None] * matrix if metric.dim() == 1 else metric @ matrix


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """(gram + ridge)^-1 right: a correction of a factor, which is 0 in directions that the Gram does not see."""
    import torch

    mean = gram.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(right)
    shifted = (gram + gram.T) / 2
    shifted.diagonal().add_(RIDGE * mean)
    return torch.cholesky_solve(right, torch.linalg.cholesky(shifted))


def product_tensors(product: Product, prefix: str) -> dict[str, Tensor]:
    return named_below(product.left.tensors, f"{prefix}left.") | named_below(product.right.tensors, f"{prefix}right.")


def factor_parts(rounded: Rounded, matrix: Matrix, form: Factors) -> dict[str, tuple[Matrix, Rounded]]:
    """{left, right: (the factor as a matrix, `rounded` of its form)}"""
    (m, n), rank = matrix.shape, form.rank
    return {
        "left": (part_of(matrix, "left", (m, rank)), of_form(rounded, form.left)),
        "right": (part_of(matrix, "right", (rank, n)), of_form(rounded, form.right)),
    }


def product_layouts(rounded: Rounded, matrix: Matrix, form: Factors) -> dict[str, Any]:
    """{left, right: layout of the rounded factor}"""
    parts = factor_parts(rounded, matrix, form).items()
    return {name: layout for name, (part, one) in parts for layout in one.layouts([part], 1).values()}


def stored_product(rounded: Rounded, matrix: Matrix, form: Factors, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of both rounded factors, whose fits are below `left.` and `right.`, by the same names."""
    found: dict[str, Tensor] = {}
    for name, (part, one) in factor_parts(rounded, matrix, form).items():
        found |= named_below(layout_and_tensors(part, one, below(tensors, f"{name}.")).tensors, f"{name}.")
    return found


def restored_product(rounded: Rounded, form: Factors, columns: int, tensors: dict[str, Tensor]) -> Tensor:
    """left right (m, n) in float64, from fits below `left.` and `right.`."""
    left = of_form(rounded, form.left).restored(below(tensors, "left."), 1, form.rank)
    return left @ of_form(rounded, form.right).restored(below(tensors, "right."), 1, columns)


def product_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
    """An empty module of layouts {left, right}; the bias is that of the left factor."""
    from torch import nn

    from winnow.numerics.modules import ChainLinear

    right = Rounded.module(layout["right"], nn.Linear(1, 1, bias=False))
    return ChainLinear(right, Rounded.module(layout["left"], dense))  # type: ignore[arg-type]
