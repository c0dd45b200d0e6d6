"""`rounded_offsets`: W rounded to nearest with zero points that are real numbers, as in HQQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from winnow.numerics.grids import Form
from winnow.structures.base import Problem
from winnow.structures.forms import RoundedForms

if TYPE_CHECKING:
    from torch import Tensor, nn


class RoundedOffsets(RoundedForms):
    """Every number of W as (code - zero) * scale, with a scale and a zero point in float16 for every `group` inputs of a row.
    Zero points are fitted by half-quadratic splitting, which needs no data: a metric only measures the error."""

    reference = "HQQ, Badri and Shaji 2023"
    stores = "steps (m, n) of `bits` bits, packed by rows; scale and zero (m, ceil(n / group)), float16"
    formula = "m n steps, 2 m ceil(n / group) scales and zero points"
    bias_name = "bias"

    class Options(RoundedForms.Options):
        kind: Literal["rounded_offsets"]

    options: Options

    def form_bytes(self, form: Form, rows: int, columns: int) -> int:
        return rows * (-(-columns * form.bits // 8) + 4 * -(-columns // form.group))

    def rounded(self, problem: Problem, form: Form) -> dict[str, Tensor]:
        import torch

        from winnow.numerics.peers import half_quadratic, nearest
        from winnow.numerics.rounding import packed

        (weight,) = problem.weights.values()
        scales, zeros = half_quadratic(weight, form)
        # Codes are stored as signed numbers; zero points are real and moved with them.
        steps = packed(nearest(weight, form, scales, zeros) - form.offset, form.bits)
        return {"steps": steps, "scale": scales.view(torch.int16), "zero": zeros.view(torch.int16)}

    def matrix(self, tensors: dict[str, Tensor], form: Form, columns: int) -> Tensor:
        import torch

        from winnow.numerics.rounding import multiplied, unpacked

        # In float32, as the module does: with real zero points that is not exact.
        scales, zeros = (tensors[name].view(torch.float16).float() for name in ("scale", "zero"))
        steps = unpacked(tensors["steps"], columns, form.bits).float()
        return multiplied(steps, scales, form.group, zeros - form.offset).double()

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import has_bias
        from winnow.numerics.rounded_modules import OffsetsLinear

        return OffsetsLinear(layout["in"], layout["out"], layout["bits"], layout["group"], has_bias(dense))
