"""`rounded`: W itself, its numbers rounded to nearest on a grid of 2 to 8 bits: what people compare a compressed model with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from winnow.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Rounded(Structure):
    """Every number of W as a whole multiple of the scale of its group, `group` inputs of a row, on a symmetric grid. Size s is
    the s-th of `bits`: with one, a budget says `rank_fraction: 1`. With scales `largest` no metric changes what is stored, only
    what the error is measured in. It saves bytes, no time: numbers are multiplied out at every call."""

    reference = "round to nearest, the baseline of GPTQ, arXiv 2210.17323"
    stores = "steps (m, n) of some bits each, packed by rows; scale (m, ceil(n / group)), float16"
    formula = "m n steps, m ceil(n / group) scales"
    bias_name = "bias"
    predicts = True

    class Options(StructureOptions):
        kind: Literal["rounded"]
        bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(
            [8], min_length=1, description="of a number, 2 to 8, in ascending order: a size each, of steps up to 2^(bits - 1) - 1"
        )
        group: int | None = Field(32, ge=4, description="inputs of a row that share a scale; null: the whole row")
        scales: Literal["largest", "searched"] = Field(
            "largest",
            description="largest: the largest number of a group is at an end of the grid; searched: it may be cut off, where "
            "that lowers the squared error, inputs weighted by the diagonal of the metric",
        )

        @field_validator("bits")
        @classmethod
        def _ascending(cls, bits: list[int]) -> list[int]:
            if bits != sorted(set(bits)):
                raise ValueError(f"bits are sizes, from few to many and each once: {sorted(set(bits))}")
            return bits

    options: Options

    def _group(self, matrix: Matrix) -> int:
        return min(self.options.group or matrix.shape[1], matrix.shape[1])

    def untrainable(self) -> str | None:
        return "rounded stores integers, which are not trained"

    def limit(self, group: list[Matrix]) -> int:
        return len(self.options.bits)

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return 0  # of the weights' dtype; `index_bytes` has all that is stored

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        (m, n), width = group[0].shape, self._group(group[0])
        return m * (-(-n * self.options.bits[size - 1] // 8) + 2 * -(-n // width))

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.linalg import weighted_error
        from winnow.rounding import in_float16, multiplied, packed, scales_of, searched_scales, steps_of

        (weight,), width = problem.weights.values(), self._group(problem.group[0])
        columns, rows = self.metric_of_error(problem)
        diagonal = columns if columns.dim() == 1 else columns.diagonal()
        stored: dict[str, Tensor] = {}
        errors = [weighted_error(weight, columns, rows)]
        for bits in self.options.bits:
            if self.options.scales == "searched":
                scales = searched_scales(weight, bits, width, diagonal)
            else:
                scales = in_float16(scales_of(weight, bits, width))
            steps = steps_of(weight, scales, bits, width)
            errors.append(weighted_error(weight - multiplied(steps, scales.double(), width), columns, rows))
            stored |= {f"{bits}.steps": packed(steps, bits), f"{bits}.scale": scales.view(torch.int16)}
        return Fit(stored, torch.stack(errors), errors[0].sqrt()[None])

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        from winnow.linalg import weighted_error
        from winnow.rounding import multiplied, unpacked

        ((name, weight),), width = problem.weights.items(), self._group(problem.group[0])
        columns, rows = problem.sites[name]["gram"], problem.outputs[name]["gradient_gram"]
        errors = [weighted_error(weight, columns, rows)]
        for bits in self.options.bits:
            steps = unpacked(tensors[f"{bits}.steps"], weight.shape[1], bits).double()
            scales = tensors[f"{bits}.scale"].view(torch.float16).double()
            errors.append(weighted_error(weight - multiplied(steps, scales, width), columns, rows))
        return torch.stack(errors) / 2

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        (m, n), bits = group[0].shape, self.options.bits[size - 1]
        layout = {"kind": self.kind(), "out": m, "in": n, "bits": bits, "group": self._group(group[0])}
        own = {name: tensors[f"{bits}.{name}"] for name in ("steps", "scale")}
        return {group[0].module: Part(layout, {**own, "weight": torch.empty(0)})}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.modules import RoundedLinear, has_bias

        return RoundedLinear(layout["in"], layout["out"], layout["bits"], layout["group"], has_bias(dense))
