"""`rounded_channels`: W rounded to nearest after its input channels are scaled, as in AWQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from winnow.models.architectures import Matrix
from winnow.numerics.grids import Form
from winnow.structures.base import Part, Problem
from winnow.structures.forms import RoundedForms

if TYPE_CHECKING:
    from torch import Tensor, nn


class RoundedChannels(RoundedForms):
    """W = Q diag(channel): inputs are multiplied by `channel`, a power of their mean absolute values with an exponent of 0 to -1,
    and Q is rounded to nearest with scales and zero points by the largest and smallest number of a group. Of 21 exponents, that
    with the lowest error in the metric is stored.

    In AWQ the preceding norm or matrix is multiplied by the factors, so that the matrices that read the same input share them and
    nothing is stored; a matrix after which there is none is left without. Here every matrix has its own, which are stored."""

    reference = "AWQ, arXiv 2306.00978; channel scales stored"
    stores = (
        "rounded.steps (m, n) of `bits` bits, packed by rows; rounded.scale (m, ceil(n / group)), float16; rounded.zero, as "
        "scale, of `bits` bits; channel (n), float16"
    )
    formula = "m n steps, m ceil(n / group) scales and zero points, n channel scales"
    bias_name = "rounded.bias"

    class Options(RoundedForms.Options):
        kind: Literal["rounded_channels"]

    options: Options

    def needs(self) -> tuple[str, ...]:
        return ("mean_abs",)

    def form_bytes(self, form: Form, rows: int, columns: int) -> int:
        return rows * form.row_bytes(columns) + 2 * columns

    def rounded(self, problem: Problem, form: Form) -> dict[str, Tensor]:
        import torch

        from winnow.numerics.grids import scaled
        from winnow.numerics.peers import nearest, scaled_channels
        from winnow.numerics.rounding import packed

        ((name, weight),) = problem.weights.items()
        channel = scaled_channels(weight, form, problem.sites[name]["mean_abs"], *self.metric_of_error(problem))
        inner = weight / channel.double()
        scales, zeros = scaled(inner, form, "largest", torch.ones_like(weight[0]))
        steps = packed(nearest(inner, form, scales, zeros) - form.offset, form.bits)
        zero = packed(zeros - form.offset, form.bits)
        return {"steps": steps, "scale": scales.view(torch.int16), "zero": zero, "channel": channel.view(torch.int16)}

    def matrix(self, tensors: dict[str, Tensor], form: Form, columns: int) -> Tensor:
        import torch

        from winnow.numerics.rounding import multiplied, unpacked

        scales, channel = (tensors[name].view(torch.float16).double() for name in ("scale", "channel"))
        steps = unpacked(tensors["steps"], columns, form.bits).double()
        zeros = unpacked(tensors["zero"], scales.shape[1], form.bits).double()
        return multiplied(steps, scales, form.group, zeros) * channel

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        ((module, part),) = super().stored(group, tensors, size).items()
        own = {name if name in ("weight", "channel") else f"rounded.{name}": tensor for name, tensor in part.tensors.items()}
        return {module: Part(part.layout, {**own, "rounded.weight": part.tensors["weight"]})}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import has_bias
        from winnow.numerics.rounded_modules import ChannelsLinear

        return ChannelsLinear(layout["in"], layout["out"], layout["bits"], layout["group"], has_bias(dense))
