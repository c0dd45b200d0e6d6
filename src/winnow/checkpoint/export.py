"""Exports a compressed checkpoint as a dense model with the same outputs, which transformers and other tools load without
winnow."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from winnow.checkpoint.card import WITHOUT_WINNOW, Exported, card
from winnow.checkpoint.hf import WinnowConfig
from winnow.checkpoint.layouts import install
from winnow.checkpoint.measured import Measured
from winnow.errors import InputError, first_line
from winnow.io.artifacts import MANIFEST, Bundle, write_manifest
from winnow.io.local_paths import named, without_local
from winnow.io.records import Provenance, Shaped
from winnow.models.architectures import Matrix, matrices_of, outer_of
from winnow.models.classes import read_config
from winnow.models.config_json import METHOD
from winnow.models.experts import unfuse
from winnow.models.files import weight_files
from winnow.models.naming import stored_tensors
from winnow.models.weights import SHARD_BYTES, copy_files, write_weights
from winnow.numerics.modules import RoundedLinear

ORIGINAL = "original"  # the dtype that the dense model stores a tensor in
COLUMNS = 1024  # columns of a matrix computed at a time
CHUNK = 1 << 22  # numbers whose rounding is measured at a time
ROUNDING = 1e-9  # largest relative rounding error of float64 products


class Checkpoint:
    """A compressed checkpoint on disk: its dense model without weights, the same with compressed modules, and its tensors."""

    def __init__(self, directory: Path):
        """Raises InputError if the directory is not a complete checkpoint of a supported format."""
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory}: no config.json; a winnow checkpoint is needed")
        self.directory = directory
        if (directory / MANIFEST).is_file():  # a checkpoint saved by `save_pretrained` has none
            Bundle(directory / MANIFEST).verify()
        self.config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        stored = self.config.pop("quantization_config", None) or {}
        if stored.get("quant_method") != METHOD:
            raise InputError(f"{directory / 'config.json'}: no quantization_config of winnow; it is not a compressed checkpoint")
        self.layouts = WinnowConfig(**stored).layers
        self.dense = _skeleton(directory, self.layouts)
        self.compressed = deepcopy(self.dense)
        install(self.compressed, self.layouts)
        self.places = stored_tensors(self.compressed, weight_files(directory))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its canonical name, as stored; tied tensors are resolved."""
        place = self.places[name if name in self.places else self.compressed.all_tied_weights_keys[name]]
        with safe_open(place.file, framework="pt") as stream:
            return stream.get_tensor(place.key)

    def matrices(self) -> list[Matrix]:
        """The compressible matrices of the dense model."""
        shapes: dict[str, Shaped] = {name: {"shape": list(tensor.shape)} for name, tensor in self.dense.state_dict().items()}
        return matrices_of(self.dense.config.model_type, shapes)

    def outer(self) -> list[Matrix]:
        """The compressed ones of embeddings and head, which are `rounded`. Raises InputError for an adapter beside a tied head,
        which would no longer be tied in another format."""
        shapes: dict[str, Shaped] = {name: {"shape": list(tensor.shape)} for name, tensor in self.dense.state_dict().items()}
        matrices = outer_of(self.dense.config.model_type, shapes, self.dense.all_tied_weights_keys)
        for m in matrices:
            if self.layouts.get(m.head, {}).get("added"):
                raise InputError(f"{self.directory}: {m.head}: an adapter was merged into the tied head; load it with winnow")
        return [m for m in matrices if m.module in self.layouts]

    def module(self, name: str) -> tuple[nn.Module, torch.dtype]:
        """(a compressed module with its tensors in float64, their stored dtype, which is that of the dense matrix)."""
        module = deepcopy(self.compressed.get_submodule(name))
        stored = {key: self.tensor(f"{name}.{key}") for key in module.state_dict()}
        dtype = next(t.dtype for t in stored.values() if t.is_floating_point())
        module.load_state_dict({k: t.double() if t.is_floating_point() else t for k, t in stored.items()}, assign=True)
        return module, dtype


def _skeleton(directory: Path, layouts: dict[str, Any]) -> Any:
    """The dense model on `meta`, of the class that config.json names or else a causal language model, whichever has the
    compressed modules."""
    config = read_config(directory)
    del config.quantization_config
    named = getattr(transformers, (config.architectures or [""])[0], None)
    for build in (*([named._from_config] if named else []), AutoModelForCausalLM.from_config):
        try:
            with torch.device("meta"):
                model = unfuse(build(config))
        except ValueError as error:  # not a causal language model
            raise InputError(f"{directory / 'config.json'}: {first_line(error)}") from error
        names = {name for name, _ in model.named_modules()}
        if names >= set(layouts):
            return model
    raise InputError(f"{directory}: the model class has no {sorted(set(layouts) - names)[0]}, a module that is compressed")


def widths_of(checkpoint: Checkpoint, matrices: list[Matrix]) -> dict[str, tuple[int, int]]:
    """{module: (outputs, inputs)} of the compressed modules, found on `meta`; the inputs of an FFN's last matrix are the kept
    neurons. Raises InputError if the parts of a module do not match."""
    found: dict[str, tuple[int, int]] = {}
    hidden: dict[str, int] = {}  # by the FFN's activation
    for m in matrices:
        if m.module not in checkpoint.layouts:
            continue
        inputs = hidden.get(m.activation, m.shape[1]) if m.role == "down_proj" else m.shape[1]
        try:
            outputs = checkpoint.compressed.get_submodule(m.module)(torch.empty(1, inputs, device="meta")).shape[-1]
        except RuntimeError as error:
            raise InputError(f"{checkpoint.directory}: {m.module}: its parts do not match: {first_line(error)}") from error
        if m.role in ("gate_proj", "up_proj"):
            hidden[m.activation] = outputs
        found[m.module] = (outputs, inputs)
    return found


@torch.no_grad()
def affine_of(module: nn.Module, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """(W (outputs, inputs), b (outputs,)) with module(x) = W x + b, in float64, from its outputs for unit vectors.

    Raises ValueError if the module is not affine."""
    offset = module(torch.zeros(1, inputs, dtype=torch.float64))[0]
    matrix = torch.empty(outputs, inputs, dtype=torch.float64)
    for start in range(0, inputs, COLUMNS):
        units = torch.zeros(min(COLUMNS, inputs - start), inputs, dtype=torch.float64)
        units[:, start : start + COLUMNS].fill_diagonal_(1.0)
        matrix[:, start : start + COLUMNS] = (module(units) - offset).T
    x = torch.randn(2, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = module(x)
    if float((x @ matrix.T + offset - y).abs().max()) > ROUNDING * (1 + float(y.abs().max())):
        raise ValueError("not an affine map")
    return matrix, offset


class Rounding:
    """Casts to the export's dtype and sums the squared error and the squared norm of all rounded numbers."""

    def __init__(self, dtype: str):
        self.asked = None if dtype == ORIGINAL else getattr(torch, dtype)
        self.lost = self.size = 0.0
        self.dtypes: set[torch.dtype] = set()  # of the expanded matrices

    def cast(self, tensor: Tensor, original: torch.dtype) -> Tensor:
        """The tensor in the requested dtype. Raises ValueError if a number is not finite in it."""
        dtype = self.asked or original
        cast = tensor.to(dtype).contiguous()
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            self.add(tensor, cast)
        return cast

    def add(self, tensor: Tensor, near: Tensor) -> None:
        """Count what `near` lost of the tensor. Raises ValueError if a number of `near` is not finite."""
        for exact, rounded in zip(tensor.flatten().split(CHUNK), near.flatten().split(CHUNK), strict=True):
            self.lost += float((rounded.double() - exact.double()).square().sum())
            self.size += float(exact.double().square().sum())
        if not math.isfinite(self.lost):
            raise ValueError(f"not finite as {near.dtype}; use another --dtype")

    def error(self) -> float:
        """The relative rounding error (Frobenius norm)."""
        return math.sqrt(self.lost / self.size) if self.size else 0.0


def _expanded(checkpoint: Checkpoint, matrix: Matrix, shape: tuple[int, int], rounding: Rounding) -> dict[str, Tensor]:
    """{weight, bias: tensor of the dense model}. Dropped neurons become zeros, which do not change the output.

    Raises InputError, naming the module, if no dense module computes the same."""
    kind = checkpoint.layouts[matrix.module]["kind"]
    problem = f"{checkpoint.directory}: {matrix.module} ({kind}) cannot be exported as a dense module: "
    (outputs, inputs), (rows, columns) = shape, matrix.shape
    neurons = {"gate_proj": (True, False), "up_proj": (True, False), "down_proj": (False, True)}.get(matrix.role, (False, False))
    fits = outputs == rows or (neurons[0] and outputs < rows), inputs == columns or (neurons[1] and inputs < columns)
    if not all(fits):
        raise InputError(f"{problem}it is {outputs} x {inputs}, the dense one {rows} x {columns}")
    module, dtype = checkpoint.module(matrix.module)
    try:
        part, offset = affine_of(module, outputs, inputs)
    except ValueError as error:
        raise InputError(problem + first_line(error)) from error
    weight, bias = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    weight[:outputs, :inputs], bias[:outputs] = part, offset
    if not matrix.bias and bool(bias.any()):
        raise InputError(f"{problem}it adds a bias, which the dense one does not have")
    found = {"weight": weight.T if matrix.transposed else weight} | ({"bias": bias} if matrix.bias else {})
    try:
        found = {name: rounding.cast(tensor, dtype) for name, tensor in found.items()}
    except ValueError as error:
        raise InputError(problem + first_line(error)) from error
    rounding.dtypes.add(found["weight"].dtype)
    return found


@torch.no_grad()
def rounded_matrix(module: nn.Module) -> Tensor:
    """(out, in) of a rounded matrix, with adapters that were merged into it."""
    own = cast(RoundedLinear, module)
    if own.added is None:
        return own.matrix()
    return own.matrix() + own.added.left.weight @ own.added.right.weight


def _rounded(checkpoint: Checkpoint, name: str, rounding: Rounding) -> Tensor:
    """The matrix of rounded embeddings or of a rounded head, in the dtype of the export."""
    module, dtype = checkpoint.module(name)
    try:
        weight = rounding.cast(rounded_matrix(module), dtype)
    except ValueError as error:
        raise InputError(f"{checkpoint.directory}: {name}: {first_line(error)}") from error
    rounding.dtypes.add(weight.dtype)
    return weight


def _dense_tensors(checkpoint: Checkpoint, rounding: Rounding) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense model, one module at a time, with the names of `save_pretrained`."""
    matrices = checkpoint.matrices()
    widths = widths_of(checkpoint, matrices)
    outer = checkpoint.outer()
    for name in sorted(set(checkpoint.layouts) - set(widths) - {name for m in outer for name in (m.module, m.head)}):
        kind = checkpoint.layouts[name]["kind"]
        raise InputError(
            f"{checkpoint.directory}: {name}: {kind} replaces the FFN's activation, so it cannot be exported as a dense module; "
            "this checkpoint can only be loaded with winnow"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for m in matrices:
            if m.module in widths:
                for part, tensor in _expanded(checkpoint, m, widths[m.module], rounding).items():
                    yield f"{m.module}.{part}", tensor
        for m in outer:
            yield f"{m.module}.weight", _rounded(checkpoint, m.module, rounding)
        replaced = {f"{module}.{part}" for module in widths for part in ("weight", "bias")} | {
            f"{m.module}.weight" for m in outer
        }
        yield from unchanged(checkpoint, replaced, rounding)

    for name, tensor in tensors():
        yield from revert_weight_conversion(checkpoint.dense, {name: tensor}).items()


def unchanged(checkpoint: Checkpoint, replaced: set[str], rounding: Rounding) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense model that are not `replaced`, by canonical name, in the dtype of the export; tied ones once.

    Raises InputError, naming the tensor, if a number is not finite in that dtype."""
    tied = set(checkpoint.dense.all_tied_weights_keys)
    for name in checkpoint.dense.state_dict():
        if name not in replaced and (name in checkpoint.places or name not in tied):
            tensor = checkpoint.tensor(name)
            try:
                yield name, rounding.cast(tensor, tensor.dtype)
            except ValueError as error:
                raise InputError(f"{checkpoint.directory}: {name}: {first_line(error)}") from error


def export_dense(
    source: Path,
    directory: Path,
    provenance: Provenance | None,
    measured: list[Measured] | None = None,
    dtype: str = ORIGINAL,
) -> Exported:
    """Write the checkpoint `source` as a dense Hugging Face directory; returns its bytes, dtype, and rounding error.

    Products are computed in float64 and rounded once to `dtype`, which becomes the dtype of all tensors and of the config; by
    default to the dtype of the dense matrix, with all other tensors unchanged. Raises InputError for a checkpoint that is damaged
    or that has no dense equivalent."""
    checkpoint, rounding = Checkpoint(source), Rounding(dtype)
    directory.mkdir(parents=True)
    total = write_weights(directory, _dense_tensors(checkpoint, rounding), SHARD_BYTES)
    widest = str(reduce(torch.promote_types, rounding.dtypes)).removeprefix("torch.")
    said = f"in {widest} with a relative rounding error of {rounding.error():.1e}; dense, does not need winnow"
    exported = Exported(total, widest, rounding.error(), "written as a dense model", WITHOUT_WINNOW, said)
    write_beside(checkpoint, directory, {}, exported, measured, provenance)
    return exported


def write_beside(
    checkpoint: Checkpoint,
    directory: Path,
    keys: dict[str, Any],
    exported: Exported,
    measured: list[Measured] | None,
    provenance: Provenance | None,
) -> None:
    """Write what belongs beside the weights of an export in Hugging Face layout: its config with the additional `keys`,
    tokenizer, recipe, card and manifest."""
    source = checkpoint.directory
    config = {key: value for key, value in without_local(checkpoint.config).items() if key != "torch_dtype"}
    config |= {"dtype": exported.dtype, **keys}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    copy_files([path.name for path in sorted(source.iterdir())], source, directory)
    write_card(source, directory, exported, measured, provenance)


def write_card(
    source: Path, directory: Path, exported: Exported, measured: list[Measured] | None, provenance: Provenance | None
) -> None:
    """Write recipe and card of an export of the checkpoint `source`, if it has a recipe, and the manifest of all files."""
    if (source / "recipe.yaml").is_file():  # `save_pretrained` does not write it
        recipe = named(yaml.safe_load((source / "recipe.yaml").read_text(encoding="utf-8")))
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        (directory / "README.md").write_text(card(recipe, measured, exported), encoding="utf-8")
    content = {"model_stored_bytes": exported.bytes, "dtype": exported.dtype, "rounding_error": exported.error}
    write_manifest(directory, content, provenance or {})
