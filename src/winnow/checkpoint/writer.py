"""Writes a compressed model as a Hugging Face directory, loadable with `from_pretrained` after `import winnow`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from winnow.calibration.reader import Layers
from winnow.checkpoint.card import card
from winnow.errors import InputError
from winnow.factors.members import fit_file, tensors_at
from winnow.io.artifacts import write_manifest
from winnow.io.local_paths import named, without_local
from winnow.io.records import Provenance
from winnow.io.tensors import NAMES
from winnow.models.config_json import METHOD
from winnow.models.files import ModelFiles
from winnow.models.weights import SHARD_BYTES, copy_files, write_weights
from winnow.structures.base import Structure, format_of

if TYPE_CHECKING:
    from winnow.checkpoint.recipe import Recipe, WrittenRecipe
    from winnow.io.records import AllocationRecord
    from winnow.io.specs import Presets


@dataclass(frozen=True)
class Compressed:
    """The content of a checkpoint for one group of matrices."""

    name: str  # of the group
    stored: dict[str, dict[str, Tensor]]  # {module: {name below it: tensor}}, in the dtype of the dense weights
    layouts: dict[str, dict[str, Any]]  # {module: layout}
    report: dict[str, Any]  # of its optimisation; empty if there is none


def compressed(
    files: ModelFiles, factors: Mapping[str, Layers], structure: Structure, sizes: dict[str, int | None]
) -> Iterator[Compressed]:
    """Yields every group of `sizes` that does not stay dense.

    `factors` maps the name of a fit (see `winnow.factors.members`) to its bundle, or to what fits it again. Raises InputError,
    naming the module, if a number is not finite in the stored dtype or a decomposition fails.
    """
    for name, own, group in structure.fits(files.every):
        size = sizes.get(name)
        if size is None:
            continue  # not in the budget, dense by its allocation, or stored by another member
        fit = tensors_at(factors[name], fit_file(name), size)
        dtype = getattr(torch, NAMES[files.tensors[f"{group[0].module}.weight"]["dtype"]])
        stored: dict[str, dict[str, Tensor]] = {}
        layouts: dict[str, dict[str, Any]] = {}
        try:
            parts, report = own.stored(group, fit, size), own.report(group, fit, size)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
            raise InputError(f"{group[0].module}: {error}") from error
        for module, part in parts.items():
            layouts[module], stored[module] = part.layout, {}
            for key, tensor in part.tensors.items():
                cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
                if not torch.isfinite(cast).all():
                    raise InputError(f"{module}.{key}: not finite as {dtype}; choose another dtype for the model's weights")
                stored[module][key] = cast
        for matrix in (m for m in group if m.bias):
            if bias := own.bias_of(matrix):
                stored[matrix.module][bias] = files.tensor(f"{matrix.module}.bias")
        yield Compressed(name, stored, layouts, report or {})


def compress(
    files: ModelFiles, factors: Mapping[str, Layers], structure: Structure, sizes: dict[str, int | None]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """({module: {name below it: tensor}}, {module: layout}) of all groups, for a model in memory."""
    stored: dict[str, dict[str, Tensor]] = {}
    layouts: dict[str, dict[str, Any]] = {}
    for group in compressed(files, factors, structure, sizes):
        stored |= group.stored
        layouts |= group.layouts
    return stored, layouts


def write_checkpoint(
    directory: Path,
    files: ModelFiles,
    groups: Iterable[Compressed],
    dtype: str,
    recipe: Recipe,
    provenance: Provenance,
) -> dict[str, int]:
    """Write the directory (config, weights, tokenizer, card, recipe, manifest); returns its byte counts. Each group is freed
    after it is written.

    `dtype` is the default dtype of `from_pretrained`: that of the evaluation. Raises RuntimeError if the bytes differ from the
    recipe.
    """
    directory.mkdir(parents=True)
    layouts: dict[str, dict[str, Any]] = {}
    reports: dict[str, dict[str, Any]] = {}
    own = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the compressed model by its canonical name: replaced modules first, then the unchanged ones."""
        nonlocal own
        for group in groups:
            layouts.update(group.layouts)
            reports.update({group.name: group.report} if group.report else {})
            for module, parts in group.stored.items():
                for part, tensor in parts.items():
                    own += tensor.nbytes
                    yield f"{module}.{part}", tensor
        replaced = {f"{module}.{part}" for module in layouts for part in ("weight", "bias")}
        for name in files.tensors:
            if name not in replaced:
                yield name, files.tensor(name)

    total = write_weights(directory, tensors(), SHARD_BYTES)
    stored = own + sum(recipe.get("kept_dense", {}).values())
    if stored != recipe["stored_bytes"]:
        raise RuntimeError(f"{stored} bytes are stored, but the allocation counted {recipe['stored_bytes']}")
    sizes = {"dense_bytes": recipe["dense_bytes"], "stored_bytes": stored, "model_stored_bytes": total}
    source = files.verify()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "auto_map"):  # auto_map names custom code, which no checkpoint needs
        config.pop(key, None)
    config = without_local(config) | {
        "dtype": dtype,
        "quantization_config": {"quant_method": METHOD, "format_version": format_of(layouts), "layers": layouts},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    copy_files(files.manifest["files"], source, directory)
    written: WrittenRecipe = named({**recipe, **sizes, "model_dense_bytes": files.manifest["bytes"]})
    if made := files.manifest.get("dequantized"):
        written["dequantized"] = made
    if (version_of := format_of(layouts)) > 1:
        written["format_version"] = version_of
    (directory / "recipe.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    if reports:
        (directory / "optimisation.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card(written), encoding="utf-8")
    write_manifest(directory, sizes, provenance)
    return sizes


def recipe_of(names: dict[str, str], presets: Presets, allocation: AllocationRecord) -> Recipe:
    """The content of recipe.yaml: preset names, resolved presets, the size of every group, the bytes of groups that the
    allocation keeps dense, and the experts that stay dense outside of the budget."""
    sizes = {row["group"]: row["size"] for row in allocation["groups"] if row["size"] is not None}
    kept = {row["group"]: row["stored_bytes"] for row in allocation["groups"] if row["size"] is None}
    recipe: Recipe = {
        "winnow": version("winnow"),
        "names": names,
        **presets,
        "dense_bytes": allocation["dense_bytes"],
        "stored_bytes": allocation["stored_bytes"],
        "sizes": sizes,
    }
    if allocation.get("left_dense"):
        recipe["left_dense"] = allocation["left_dense"]
    if kept:
        recipe["kept_dense"] = kept
    return recipe
