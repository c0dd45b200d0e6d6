"""The modules of `rounded_offsets` and `rounded_channels`, beside `RoundedLinear`."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.numerics.modules import CompressedLinear, RoundedLinear


class OffsetsLinear(RoundedLinear):
    """y = ((steps - zero) * scale) x + b, with zero points in float16, stored like the scales as their bits in int16."""

    def __init__(self, in_features: int, out_features: int, bits: int, group: int, bias: bool):
        super().__init__(in_features, out_features, bits, group, bias)
        self.register_buffer("zero", torch.empty_like(self.scale))
        self.zeros = True

    def scales(self) -> tuple[Tensor, Tensor | None]:
        # Stored codes are signed: 2^(bits - 1) less than those that zero points are meant for.
        scale, zero = (part.view(torch.float16).float() for part in (self.scale, self.zero))
        return scale, zero - 2 ** (self.bits - 1)


class ChannelsLinear(CompressedLinear):
    """y = rounded(channel * x), with a factor in float16 for every input channel, stored as its bits in int16; the bias is in
    `rounded`."""

    channel: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, group: int, bias: bool):
        super().__init__(in_features, out_features)
        self.rounded = RoundedLinear(in_features, out_features, bits, group, bias, zeros=True)
        self.register_buffer("channel", torch.empty(in_features, dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded((x * self.channel.view(torch.float16).float()).to(x.dtype))
