"""The split compared with quantisation of all neurons, at equal bits.

Quantisation of weights is simulated in the model's dtype. The split keeps about a third of the numbers of an FFN, so that at 8
bits it takes no more than all of them at 3 bits. Scales are counted but not rounded; biases are neither rounded nor counted, on
either side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from winnow.evaluation.spread import paired

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from winnow.evaluation.results import PerWindow
    from winnow.studies.ffsplit.found import Quantised
    from winnow.studies.ffsplit.heavy import Ffn

GROUPS = (32, None)  # inputs of a row that share a scale; None: the whole row
SCALE = 16  # bits of a scale
PAIRS = ((8, 8), (8, 4), (4, 4))  # bits of the split's heavy neurons, and of its light ones
ANSWERED = ("of 32 inputs", 8, 8, "all")  # the row that answers the claim
MOST = 16  # largest number of bits for all neurons


def rounded(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """The matrix (m, n) rounded to nearest: every group of `group` inputs of a row (the last may be smaller), or the whole row,
    has a scale; its grid is -(2^(bits - 1) - 1) ... 2^(bits - 1) - 1, with the largest number at an end. Computed in float64,
    returned in the dtype of `weight`. Raises ValueError below 2 bits."""
    from winnow.numerics.rounding import multiplied, scales_of, steps_of

    group = group or weight.shape[1]
    scales = scales_of(weight, bits, group)
    return multiplied(steps_of(weight, scales, bits, group), scales, group).to(weight.dtype).contiguous()


def bits_of(shape: tuple[int, ...], bits: int, group: int | None = None) -> int:
    """Bits of a rounded matrix (m, n), including its scales."""
    rows, columns = shape
    return rows * (columns * bits + -(-columns // (group or columns)) * SCALE)


def quantised_pairs(
    dense: PreTrainedModel,
    split: Callable[[], PreTrainedModel],
    ffns: list[Ffn],
    loss: Callable[[PreTrainedModel], PerWindow],
    of_dense: PerWindow,
) -> list[Quantised]:
    """A row per pair of a split (`split` creates a new one) and quantisation of all neurons: at the fewest bits at which the
    latter is no smaller than the split (`more` is "all"), and at one bit fewer (`more` is "split"). With the bits of each per
    number of the dense FFNs, losses above dense (nats per token), and the difference of the two losses, paired by window."""
    shapes = [_shape(transposed, weight) for _, transposed, weight in _matrices(dense, ffns)]
    numbers = sum(rows * columns for rows, columns in shapes)
    found = []
    for group in GROUPS:
        costs = {bits: sum(bits_of(shape, bits, group) for shape in shapes) for bits in range(2, MOST + 1)}
        alike: dict[int, PerWindow] = {}
        for heavy, light in PAIRS:
            model = split()
            spent = _round(model, ffns, heavy, light, group)
            own = loss(model)
            enough = next(bits for bits, cost in costs.items() if cost >= spent)
            for bits in (bits for bits in (enough, enough - 1) if bits in costs):
                if bits not in alike:
                    model = copy.deepcopy(dense)
                    _round(model, ffns, bits, bits, group)
                    alike[bits] = loss(model)
                row: Any = {"scale": f"of {group} inputs" if group else "of a row"}
                row |= {"heavy_bits": heavy, "light_bits": light, "all_bits": bits, "more": "all" if bits == enough else "split"}
                row |= {"split_per_number": spent / numbers, "all_per_number": costs[bits] / numbers}
                pairs = {"split_nll": (own, of_dense), "all_nll": (alike[bits], of_dense), "above": (own, alike[bits])}
                for name, pair in pairs.items():
                    row[name], row[f"{name}_se"] = paired(*pair)
                found.append(row)
    return found


def answered(rows: list[Quantised]) -> tuple[float, float]:
    """(nats of the split above quantisation of all neurons, standard error) for the pair of the claim."""
    (row,) = (r for r in rows if (r["scale"], r["heavy_bits"], r["light_bits"], r["more"]) == ANSWERED)
    return row["above"], row["above_se"]


def _matrices(model: PreTrainedModel, ffns: list[Ffn]) -> Iterator[tuple[bool, bool, nn.Parameter]]:
    """(whether it has light neurons, whether it is W^T, W (out, in)) for every FFN matrix stored in a dense or a split model."""
    for m in (m for ffn in ffns for m in ffn.group):
        for name, parameter in model.get_submodule(m.module).named_parameters():
            if parameter.dim() == 2:
                yield "light" in name.split("."), m.transposed and name == "weight", parameter  # a split does not transpose


def _shape(transposed: bool, parameter: nn.Parameter) -> tuple[int, int]:
    """(out, in)."""
    rows, columns = parameter.shape
    return (columns, rows) if transposed else (rows, columns)


def _round(model: PreTrainedModel, ffns: list[Ffn], heavy: int, light: int, group: int | None) -> int:
    """Round the FFNs of a model; returns their bits. The old tensors, which may be shared, are not modified."""
    total = 0
    for is_light, transposed, parameter in _matrices(model, ffns):
        bits = light if is_light else heavy
        weight = parameter.data.T if transposed else parameter.data
        found = rounded(weight, bits, group)
        parameter.data = found.T.contiguous() if transposed else found
        total += bits_of(tuple(weight.shape), bits, group)
    return total
