"""Exports a checkpoint of rounded matrices in the format `pack-quantized` of the package compressed-tensors, which transformers
and vLLM load without winnow.

The format stores a matrix as codes * scales, as `rounded` does: signed integers packed in int32, and a scale for every group of
inputs of a row. All numbers are kept exactly:

- Codes of 2 to 4 bits are stored in 4 bits, those of 5 to 8 in 8. Versions of the package pack the other widths differently, and
  not every version of vLLM reads them.
- Zero points are subtracted from their codes, which takes one bit more. The format has zero points too, but transformers fails to
  load them with current versions of the package (0.20).
- Groups that do not divide the row are split into their largest common divisor with it, each with the scale of its group.
- Scales stay float16, negative ones of the grid `full` included: engines only multiply by them.

An engine casts scales to the dtype of the model. float32 and float16 hold them exactly, bfloat16 rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors import __version__ as version
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from winnow.checkpoint.card import PACKED, Exported
from winnow.checkpoint.export import ORIGINAL, Checkpoint, Rounding, unchanged, write_beside
from winnow.checkpoint.measured import Measured
from winnow.errors import InputError, first_line
from winnow.io.records import Provenance
from winnow.models.architectures import Matrix
from winnow.models.weights import SHARD_BYTES, write_weights
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import multiplied

FORMAT = "pack-quantized"
WIDTHS = (4, 8)  # bits of a stored code
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # matrices of a layer that vLLM joins to one
GROUPS = (None, 32, 64, 128)  # inputs that share a scale, for which vLLM has kernels
SMALLEST = 32  # groups are not split into smaller ones, whose scales would take more than half a bit per number
LOADS = "transformers loads it with the package compressed-tensors, without winnow"
READS = "vLLM reads the format too, but was not tried"


class Scheme(NamedTuple):
    """How the format stores a matrix: bits of a code, and inputs that share a scale (None: the whole row)."""

    bits: int
    group: int | None

    def record(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group" if self.group else "channel", "group_size": self.group}
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT}


def scheme_of(checkpoint: Checkpoint, name: str) -> Scheme:
    """The scheme of a compressed module. Raises InputError, naming it, if the format has none."""
    layout = checkpoint.layouts[name]
    problem = f"{checkpoint.directory}: {name} ({layout['kind']}) cannot be exported to compressed-tensors: "
    if layout["kind"] != "rounded":
        raise InputError(f"{problem}the format only has matrices of the structure rounded; use --format dense")
    if layout.get("added"):
        raise InputError(f"{problem}a merged adapter is stored beside it, for which the format has no place; use --format dense")
    if layout.get("rotation"):
        raise InputError(f"{problem}its inputs are rotated, for which the format has no place; use --format dense")
    if layout.get("embeddings") or "tied" in layout:
        raise InputError(f"{problem}the format has no rounded embeddings; use --format dense or gguf, or other targets")
    if not isinstance(checkpoint.dense.get_submodule(name), nn.Linear):
        raise InputError(f"{problem}it is a Conv1D in the dense model, and the format only has Linear; use --format dense")
    bits = layout["bits"] + layout.get("zeros", False)
    if bits > WIDTHS[-1]:
        raise InputError(f"{problem}codes of 8 bits with zero points take 9 bits in it; use --format dense, or the grid full")
    columns, group = layout["in"], math.gcd(layout["group"], layout["in"])
    if group < min(layout["group"], SMALLEST):
        what = f"groups of {layout['group']} do not divide its {columns} inputs"
        raise InputError(f"{problem}{what}, only groups of {group} do, less than {SMALLEST}; use --format dense, or other groups")
    return Scheme(next(width for width in WIDTHS if bits <= width), group if group < columns else None)


def schemes_of(checkpoint: Checkpoint, joined: list[list[str]]) -> dict[str, Scheme]:
    """{compressed module: scheme}. Modules that are `joined` get the bits of the widest.

    Raises InputError, naming the module, if the format has no scheme for it, and if there is no compressed module."""
    schemes = {name: scheme_of(checkpoint, name) for name in checkpoint.layouts}
    if not schemes:
        raise InputError(f"{checkpoint.directory}: no matrix is compressed; use the original model")
    for names in joined:
        bits = max((schemes[name].bits for name in names if name in schemes), default=0)
        schemes |= {name: Scheme(bits, schemes[name].group) for name in names if name in schemes}
    return schemes


def joined_by_vllm(matrices: list[Matrix]) -> list[list[str]]:
    """The modules of every set that vLLM joins to one matrix."""
    found: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for matrix in matrices:
        for roles in JOINED:
            if matrix.role in roles:
                found.setdefault((matrix.layer, roles), []).append(matrix.module)
    return list(found.values())


def not_in_vllm(schemes: dict[str, Scheme], joined: list[list[str]]) -> str | None:
    """Why vLLM does not read the export, from its source code; None if nothing is known to prevent it."""
    for name, scheme in schemes.items():
        if scheme.group not in GROUPS:
            return f"{name} has a scale for every {scheme.group} inputs, not 32, 64, 128 or all"
    for names in joined:
        if len({schemes.get(name) for name in names}) > 1:
            return f"it joins {', '.join(names)} to one matrix, but some of them are dense or have other groups"
    return None


def in_scheme(module: RoundedLinear, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(signed codes (out, in), scales (out, groups of the scheme)) in float32, with the values of the module's matrix."""
    codes, scales, zeros = module.parts()
    if zeros is not None:
        codes = multiplied(codes, torch.ones_like(scales), module.group, zeros)
    group = scheme.group or module.in_features
    return codes, scales.repeat_interleave(module.group // group, 1)[:, : module.in_features // group]


def packed_tensors(codes: Tensor, scales: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """{name below the module: tensor of the format}."""
    return {
        "weight_packed": pack_to_int32(codes.to(torch.int8), scheme.bits),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor(codes.shape),
    }


def _tensors(
    checkpoint: Checkpoint, schemes: dict[str, Scheme], rounding: Rounding, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the export by its canonical name; the numbers that an engine multiplies out in `dtype` are compared with
    the exact ones."""
    for name, scheme in schemes.items():
        module: Any = checkpoint.module(name)[0]
        codes, scales = in_scheme(module, scheme)
        tensors = packed_tensors(codes, scales, scheme)
        try:
            near = multiplied(codes.to(dtype), scales.to(dtype), scheme.group or module.in_features)
            rounding.add(module.matrix(), near)
            if module.bias is not None:
                bias = checkpoint.tensor(f"{name}.bias")
                tensors["bias"] = rounding.cast(bias, bias.dtype)
        except ValueError as error:
            raise InputError(f"{checkpoint.directory}: {name}: {first_line(error)}") from error
        for part, tensor in tensors.items():
            yield f"{name}.{part}", tensor
    yield from unchanged(checkpoint, {f"{name}.{part}" for name in schemes for part in ("weight", "bias")}, rounding)


def export_packed(
    source: Path,
    directory: Path,
    provenance: Provenance | None,
    measured: list[Measured] | None = None,
    dtype: str = ORIGINAL,
) -> Exported:
    """Write the checkpoint `source` as a Hugging Face directory in the format of compressed-tensors; returns its bytes, the dtype
    in which it is loaded, and the rounding error of its matrices in that dtype.

    `dtype` is that of all tensors but the packed ones, and the one in which the model is loaded by default; by default the
    tensors are unchanged and it is the dtype of the evaluation. Raises InputError for a checkpoint that is damaged or that the
    format cannot express."""
    checkpoint, rounding = Checkpoint(source), Rounding(dtype)
    joined = joined_by_vllm(checkpoint.matrices())
    schemes = schemes_of(checkpoint, joined)
    loaded = str(checkpoint.config.get("dtype", "float32")) if dtype == ORIGINAL else dtype
    directory.mkdir(parents=True)
    tensors = _tensors(checkpoint, schemes, rounding, getattr(torch, loaded))
    renamed = (item for pair in tensors for item in revert_weight_conversion(checkpoint.dense, dict([pair])).items())
    total = write_weights(directory, renamed, SHARD_BYTES)
    reason = not_in_vllm(schemes, joined)
    engine = f"vLLM does not read it: {reason}" if reason else READS
    said = f"loaded in {loaded} with a relative rounding error of {rounding.error():.1e}; {LOADS}; {engine}"
    exported = Exported(total, loaded, rounding.error(), "in the format compressed-tensors", PACKED, said, engine)
    config = {"quantization_config": _quantization_config(checkpoint, schemes)}
    write_beside(checkpoint, directory, config, exported, measured, provenance)
    return exported


def _quantization_config(checkpoint: Checkpoint, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """The entry of config.json. With several schemes their targets are names of modules; vLLM demands that every other Linear is
    in `ignore`."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {
        f"group_{number}": scheme.record(names if len(by_scheme) > 1 else ["Linear"])
        for number, (scheme, names) in enumerate(by_scheme.items())
    }
    dense = [n for n, m in checkpoint.dense.named_modules() if isinstance(m, nn.Linear) and n not in schemes]
    return {
        "quant_method": "compressed-tensors",
        "version": version,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
