"""How vLLM's layers compute with compressed matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from winnow.engines.vllm.checked import Described
from winnow.engines.vllm.parts import Parts, Tensors
from winnow.engines.vllm.rounded import FewBits, suits
from winnow.errors import InputError
from winnow.numerics.modules import SharedLinear


class CompressedLinearMethod(LinearMethodBase):
    """The layer's matrices as the modules of the checkpoint, whose biases they include."""

    def __init__(self, found: Described, names: list[str], tensors: Tensors):
        """`names`: the modules of the checkpoint that the layer joins."""
        self.found, self.names, self.tensors = found, names, tensors
        self.dtype = torch.float32

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the modules below the layer, where vLLM's loader finds them by `Places`. Raises InputError for a layer that
        returns its bias separately."""
        if layer.skip_bias_add:
            raise InputError(
                f"{self.names[0]}: vLLM adds the bias of this layer elsewhere; load the checkpoint with transformers"
            )
        self.dtype = params_dtype
        parts = {name: self.found.take(name) for name in self.names}
        for part in parts.values():
            self.tensors.allocate(part, params_dtype)
        layer.compressed = Parts(parts, self.tensors)
        layer.load_weights = layer.compressed.load_weights  # in place of that of joined layers, which knows dense matrices

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.compressed.finish(self._around)
        if current_platform.is_cpu():
            self._pack(layer.compressed)
        layer.register_parameter("bias", None)  # never loaded: the parts have the biases

    def _around(self, name: str, part: nn.Module) -> nn.Module:
        return self.found.passing[name].around(part) if name in self.found.passing else part

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.compressed(x)

    def _pack(self, module: nn.Module) -> None:
        """Replace the products of a module by those that vLLM uses on CPUs, whose matrices have another layout."""
        child: Any
        for name, child in list(module.named_children()):
            if suits(child, self.dtype):
                few = FewBits(child)
                self._pack(few)
                setattr(module, name, few)
            elif type(child) in (nn.Linear, SharedLinear):
                setattr(module, name, self.tensors.replaced(child, Product))
            else:
                self._pack(child)


class Product(nn.Module):
    """A dense matrix (out, in), as vLLM stores and multiplies it on CPUs."""

    cpu_linear: Any  # made by vLLM

    def __init__(self, dense: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(dense.weight.detach(), requires_grad=False)
        self.bias = dense.bias
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cpu_linear(x, self.weight, self.bias)
