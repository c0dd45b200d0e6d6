"""`rounded`: W itself, its numbers rounded to nearest on a grid of 8 or 4 bits: what people compare a compressed model with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Rounded(Structure):
    """Every number of W as a whole multiple of the scale of its group: `group` inputs of a row, the largest of them at an end of
    the symmetric grid. No metric changes what is stored, only what the error is measured in. It has one size, so a budget says
    `rank_fraction: 1`. It saves bytes, no time: numbers are multiplied out at every call."""

    reference = "round to nearest, the baseline of GPTQ, arXiv 2210.17323"
    stores = "steps (m, n) of 8 bits, or of 4 two to a byte; scale (m, ceil(n / group)), float16"
    formula = "m n steps, m ceil(n / group) scales"
    bias_name = "bias"

    class Options(StructureOptions):
        kind: Literal["rounded"]
        bits: Literal[8, 4] = Field(8, description="of a number: steps from -127 to 127, or from -7 to 7")
        group: int | None = Field(32, ge=4, description="inputs of a row that share a scale; null: the whole row")

    options: Options

    def _group(self, matrix: Matrix) -> int:
        return min(self.options.group or matrix.shape[1], matrix.shape[1])

    def untrainable(self) -> str | None:
        return "rounded stores integers, which are not trained"

    def limit(self, group: list[Matrix]) -> int:
        return 1

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return 0  # of the weights' dtype; `index_bytes` has all that is stored

    def index_bytes(self, group: list[Matrix]) -> int:
        (m, n), width = group[0].shape, self._group(group[0])
        return m * (-(-n * self.options.bits // 8) + 2 * -(-n // width))

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.rounding import in_float16, multiplied, packed, scales_of, steps_of

        (weight,), width = problem.weights.values(), self._group(problem.group[0])
        scales = in_float16(scales_of(weight, self.options.bits, width))
        steps = steps_of(weight, scales, width)
        columns, rows = self.metric_of_error(problem)

        def error(rest: Tensor) -> Tensor:
            weighted = rest if rows is None else rows[:, None] * rest if rows.dim() == 1 else rows @ rest
            return ((rest * columns if columns.dim() == 1 else rest @ columns) * weighted).sum()

        errors = torch.stack([error(weight), error(weight - multiplied(steps, scales.double(), width))]).clamp(min=0)
        stored = {"steps": packed(steps) if self.options.bits == 4 else steps.to(torch.int8), "scale": scales.view(torch.int16)}
        return Fit(stored, errors, errors[:1].sqrt())

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        (m, n), bits = group[0].shape, self.options.bits
        layout = {"kind": self.kind(), "out": m, "in": n, "bits": bits, "group": self._group(group[0])}
        own = {name: tensors[name] for name in ("steps", "scale")}
        return {group[0].module: Part(layout, {**own, "weight": torch.empty(0)})}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.modules import RoundedLinear, has_bias

        return RoundedLinear(layout["in"], layout["out"], layout["bits"], layout["group"], has_bias(dense))
