"""`split`: the FFN's heavy neurons are kept, its light ones are low-rank maps in each of its matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.models.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, StructureOptions
from winnow.structures.ffn import FfnStructure, statistics_of

if TYPE_CHECKING:
    from torch import Tensor, nn


class Split(FfnStructure):
    """Neurons are sorted by importance; the first share `exact` is stored unchanged. The light rows of gate and up and the light
    columns of down are each replaced by the best rank-k map in the method's metric. No order is stored: all matrices of the FFN
    have the same order of neurons."""

    reference = "FFSplit, arXiv 2401.04044"
    stores = "per matrix: heavy rows (h, d), light left (f - h, k) and right (k, d); in down the same for columns"
    formula = "3 (h d + k (f - h + d)); 2 without gate"

    class Options(StructureOptions):
        kind: Literal["split"]
        exact: float = Field(0.25, ge=0, le=1, description="share of the neurons that is kept unchanged")
        criterion: Literal["activation", "activation_x_row", "weight_norm", "leverage", "random", "lowest"] = Field(
            "activation", description="importance of a neuron; see winnow/numerics/neurons.py"
        )
        seed: int = Field(0, ge=0, description="seed of the random criterion")

    options: Options

    def needs(self) -> tuple[str, ...]:
        return statistics_of(self.options.criterion)

    def _heavy(self, group: list[Matrix]) -> int:
        return round(self.options.exact * group[-1].shape[1])

    def limit(self, group: list[Matrix]) -> int:
        (d, f) = group[-1].shape
        return min(d, f - self._heavy(group))

    def count(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        (d, f), heavy = group[-1].shape, self._heavy(group)
        light = size * (f - heavy + d) if f > heavy else 0
        return len(group) * (heavy * d + light) + sum(m.shape[0] for m in group if m.bias)

    def fit_ffn(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.linalg import leading_directions
        from winnow.numerics.neurons import order_of, permuted

        heavy = self._heavy(problem.group)
        order = order_of(problem, self.options.criterion, self.options.seed)
        light, whole = order[heavy:], permuted(problem, order)
        tensors = {"order": order, **{name: t for name, t in whole.items() if name.endswith(".bias")}}
        errors, spectra = [], []
        for m in problem.group:
            weight, columns, rows = whole[f"{m.role}.weight"], problem.columns([m]), problem.rows([m])
            if m is problem.group[-1]:
                exact, rest = weight[:, :heavy], weight[:, heavy:]
                columns = columns[light] if columns.dim() == 1 else columns[light][:, light]
            else:
                exact, rest = weight[:heavy], weight[heavy:]
                rows = rows if rows is None else rows[light] if rows.dim() == 1 else rows[light][:, light]
            tensors[f"{m.role}.exact"] = exact
            if len(light):
                found = leading_directions(rest, columns, problem.precision, rows, largest)
                tensors |= {f"{m.role}.left": found.left, f"{m.role}.right": found.right}
                errors.append(found.error[: largest + 1])
                spectra.append(found.spectrum)
        if not len(light):
            return Fit(tensors, torch.zeros(largest + 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        return Fit(tensors, torch.stack(errors).sum(0), torch.cat(spectra).sort(descending=True).values)

    def store_ffn(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        (d, f), heavy, found = group[-1].shape, self._heavy(group), {}
        for m in group:
            own = {"exact.weight": tensors[f"{m.role}.exact"]} if heavy else {}
            own["weight"] = tensors[f"{m.role}.exact"].new_empty(0)
            if heavy < f:
                left, right = tensors[f"{m.role}.left"][:, :size], tensors[f"{m.role}.right"][:size]
                own |= {"light.left.weight": left, "light.right.weight": right, "light.weight": left.new_empty(0)}
            if m.bias and m is group[-1]:
                own["bias"] = tensors[f"{m.role}.bias"]
            elif m.bias:
                exact, light = tensors[f"{m.role}.bias"].split([heavy, f - heavy])
                own |= ({"exact.bias": exact} if heavy else {}) | ({"light.left.bias": light} if heavy < f else {})
            part = "down" if m is group[-1] else "up"
            layout = {"kind": self.kind(), "part": part, "d": d, "exact": heavy, "light": f - heavy, "rank": size}
            found[m.module] = Part(layout, own)
        return found

    @staticmethod
    def part_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import ConcatLinear, LowRankLinear, SplitLinear, has_bias

        d, exact, light, bias = layout["d"], layout["exact"], layout["light"], has_bias(dense)
        parts: dict[str, nn.Module] = {}
        if layout["part"] == "up":
            if exact:
                parts["exact"] = nn.Linear(d, exact, bias)
            if light:
                parts["light"] = LowRankLinear(d, light, layout["rank"], bias)
            return ConcatLinear(parts)
        if exact:
            parts["exact"] = nn.Linear(exact, d, bias=False)
        if light:
            parts["light"] = LowRankLinear(light, d, layout["rank"], False)
        return SplitLinear(parts, [width for width in (exact, light) if width], bias=d if bias else 0)
