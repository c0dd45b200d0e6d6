"""`split_affine`: the FFN's heavy neurons are kept, its light ones become one affine map of the FFN's input, or are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.models.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, StructureOptions
from winnow.structures.ffn import FfnStructure, statistics_of

if TYPE_CHECKING:
    from torch import Tensor, nn


class SplitAffine(FfnStructure):
    """y = W_down[:, heavy] h_heavy + A x + b, with A x + b the exact least-squares fit of the light neurons' contribution. A size
    is the number of heavy neurons. With `light: dropped` there is no A, and b is the FFN's own bias."""

    reference = "FFSplit, arXiv 2401.04044, with the linear replacement of R2_lin, arXiv 2606.19379, for the light part"
    stores = "k rows of gate and up, k columns of down, A (d, d), b (d)"
    formula = "3 k d + d (d + 1); 2 k d + ... without gate; no A, b if dropped"
    objective = "ffn_output"
    keeps_activation = False

    class Options(StructureOptions):
        kind: Literal["split_affine"]
        light: Literal["affine", "dropped"] = Field("affine", description="replacement of the light neurons")
        criterion: Literal["activation", "activation_x_row", "weight_norm", "leverage", "random", "lowest"] = Field(
            "activation_x_row", description="importance of a neuron; see winnow/numerics/neurons.py"
        )
        seed: int = Field(0, ge=0, description="seed of the random criterion")
        ridge: float = Field(1e-8, gt=0, le=1, description="relative ridge of the regression; raised if it is singular")

    options: Options

    def needs(self) -> tuple[str, ...]:
        affine = ("gram", "mean", "cross") if self.options.light == "affine" else ("gram",)
        return tuple(dict.fromkeys((*affine, *statistics_of(self.options.criterion))))

    def not_dense(self) -> str | None:
        return "split_affine has channels that pass the activation unchanged" if self.options.light == "affine" else None

    def count(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        (*inner, down), affine = group, self.options.light == "affine"
        d = down.shape[0]
        biases = size * sum(m.bias for m in inner) + (d if affine or down.bias else 0)
        return len(group) * size * d + (d * d if affine else 0) + biases

    def fit_ffn(self, problem: Problem, largest: int) -> Fit:
        from winnow.numerics.neurons import affine_map, left_out, order_of, permuted

        down = problem.group[-1]
        order = order_of(problem, self.options.criterion, self.options.seed)
        tensors = permuted(problem, order)
        if self.options.light == "affine":
            maps, constant, rest = affine_map(problem, self.options.ridge)
            tensors |= {"map": maps[order], "constant": constant[order]}
        else:
            rest = problem.sites[down.name]["gram"]
        weight = tensors[f"{down.role}.weight"]
        error = left_out((weight.T @ weight) * rest[order][:, order])
        return Fit(tensors, error[: largest + 1], rest.diagonal()[order].clamp(min=0).sqrt() * weight.norm(dim=0))

    def store_ffn(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        *inner, down = group
        d, affine = down.shape[0], self.options.light == "affine"
        layout = {"kind": self.kind(), "d": d, "exact": size, "affine": affine}
        weight, found = tensors[f"{down.role}.weight"], {}
        empty = weight.new_empty(0)
        for m in inner:
            own = {"exact.weight": tensors[f"{m.role}.weight"][:size], "weight": empty}
            if m.bias:
                own["exact.bias"] = tensors[f"{m.role}.bias"][:size]
            if affine and m is inner[-1]:
                own["affine.weight"] = weight[:, size:] @ tensors["map"][size:]
            found[m.module] = Part({**layout, "part": "up" if m is inner[-1] else "gate"}, own)
        bias = tensors.get(f"{down.role}.bias")
        if affine:
            added = weight[:, size:] @ tensors["constant"][size:]
            bias = added if bias is None else bias + added
            found[down.activation] = Part({**layout, "part": "activation"}, {})
        own = {"exact.weight": weight[:, :size], "weight": empty, **({} if bias is None else {"bias": bias})}
        found[down.module] = Part({**layout, "part": "down"}, own)
        return found

    @staticmethod
    def part_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import ConcatLinear, Constant, PartialActivation, SplitLinear, has_bias

        d, exact, affine = layout["d"], layout["exact"], layout["affine"]
        if layout["part"] == "activation":
            return PartialActivation(dense, exact)
        if layout["part"] == "down":
            rest: dict[str, nn.Module] = {"affine": nn.Identity()} if affine else {}
            bias = d if affine or has_bias(dense) else 0
            return SplitLinear({"exact": nn.Linear(exact, d, bias=False), **rest}, [exact, d][: 1 + affine], bias=bias)
        parts: dict[str, nn.Module] = {"exact": nn.Linear(d, exact, has_bias(dense))}
        if affine:
            parts["affine"] = nn.Linear(d, d, bias=False) if layout["part"] == "up" else Constant(d, 1.0)
        return ConcatLinear(parts)
