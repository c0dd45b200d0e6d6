"""Writing a compressed model as a Hugging Face directory that loads by `from_pretrained` after `import winnow`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from winnow.card import card
from winnow.errors import InputError
from winnow.io import Bundle, write_manifest
from winnow.members import fit_file
from winnow.models import ModelFiles
from winnow.structures.base import FORMAT_VERSION, METHOD, Structure
from winnow.weights import SHARD_BYTES, copy_files, write_weights


def compress(
    files: ModelFiles, factors: dict[str, Bundle], structure: Structure, sizes: dict[str, int | None]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """({module: {name below it: tensor}}, {module: layout}, {group: report of its optimisation, where there is one}) for every
    group of `sizes` that does not stay dense, in the dtype of the dense weights.

    `factors` maps the name of a fit (see `winnow.members`) to the bundle that holds it. Raises InputError, naming the module, if
    a number is not finite in the stored dtype.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    layouts: dict[str, dict[str, Any]] = {}
    reports: dict[str, dict[str, Any]] = {}
    for name, own, group in structure.fits(files.matrices):
        size = sizes.get(name)
        if size is None:
            continue  # not in the budget, dense by its allocation, or stored in another way
        fit = factors[name].tensors(fit_file(name))
        dtype = files.tensor(f"{group[0].module}.weight").dtype
        for module, part in own.stored(group, fit, size).items():
            layouts[module], stored[module] = part.layout, {}
            for key, tensor in part.tensors.items():
                cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
                if not torch.isfinite(cast).all():
                    raise InputError(f"{module}.{key}: not finite as {dtype}; choose another dtype for the model's weights")
                stored[module][key] = cast
        if report := own.report(group, fit, size):
            reports[name] = report
        for matrix in (m for m in group if m.bias):
            if bias := own.bias_of(matrix):
                stored[matrix.module][bias] = files.tensor(f"{matrix.module}.bias")
    return stored, layouts, reports


def _all_tensors(files: ModelFiles, stored: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the compressed model by its canonical name: replaced modules first, then what stays."""
    for module, tensors in stored.items():
        for part, tensor in tensors.items():
            yield f"{module}.{part}", tensor
    replaced = {f"{module}.{part}" for module in stored for part in ("weight", "bias")}
    for name in files.tensors:
        if name not in replaced:
            yield name, files.tensor(name)


def write_checkpoint(
    directory: Path,
    files: ModelFiles,
    stored: dict[str, dict[str, Tensor]],
    layouts: dict[str, dict[str, Any]],
    reports: dict[str, dict[str, Any]],
    dtype: str,
    recipe: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, int]:
    """Write the directory (config, weights, tokenizer, card, recipe, manifest); returns its byte counts.

    `dtype` is what `from_pretrained` computes in by default: the one that the evaluation uses.
    """
    directory.mkdir(parents=True)
    compressed = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors.values())
    compressed += sum(recipe.get("kept_dense", {}).values())
    if compressed != recipe["stored_bytes"]:
        raise RuntimeError(f"{compressed} bytes are stored, the allocation counted {recipe['stored_bytes']}")
    total = write_weights(directory, _all_tensors(files, stored), SHARD_BYTES)
    sizes = {"dense_bytes": recipe["dense_bytes"], "stored_bytes": compressed, "model_stored_bytes": total}
    source = files.verify()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "auto_map"):  # the second names code, which no checkpoint needs
        config.pop(key, None)
    config |= {
        "dtype": dtype,
        "quantization_config": {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": layouts},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    copy_files(files.manifest["files"], source, directory)
    recipe = {**recipe, **sizes, "model_dense_bytes": files.manifest["bytes"]}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    if reports:
        (directory / "optimisation.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card(recipe), encoding="utf-8")
    write_manifest(directory, sizes, provenance)
    return sizes


def recipe_of(names: dict[str, str], presets: dict[str, Any], allocation: dict[str, Any]) -> dict[str, Any]:
    """The content of recipe.yaml: preset names, resolved presets, the size of every group, the bytes of those that the allocation
    keeps dense, and the experts that stay dense outside of the budget."""
    sizes = {row["group"]: row["size"] for row in allocation["groups"] if row["size"] is not None}
    counts = {key: allocation[key] for key in ("dense_bytes", "stored_bytes")}
    kept = {row["group"]: row["stored_bytes"] for row in allocation["groups"] if row["size"] is None}
    dense = {"left_dense": allocation["left_dense"]} if allocation.get("left_dense") else {}
    dense |= {"kept_dense": kept} if kept else {}
    return {"winnow": version("winnow"), "names": names, **presets, **counts, "sizes": sizes, **dense}
