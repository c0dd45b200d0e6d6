"""Builds the modules described in a checkpoint's config on an empty (meta) model, after checking every number in it.

A config is untrusted: nothing in it may make the loader run code, replace a module that is not a matrix or activation, or
allocate more memory than the weight files justify. Sizes are bounded by those of the dense matrix, and the shapes of all stored
tensors are compared with the files before memory is allocated.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from winnow.errors import InputError, first_line
from winnow.structures.base import STRUCTURES

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError)


def check_layouts(layers: Any) -> dict[str, dict[str, Any]]:
    """Returns `layers` if it maps modules to layouts of known structures; raises InputError otherwise."""
    if not isinstance(layers, dict) or not all(isinstance(layout, dict) for layout in layers.values()):
        raise InputError("the checkpoint's config is damaged: quantization_config.layers does not map modules to layouts")
    for layout in layers.values():
        kind = layout.get("kind")
        if not isinstance(kind, str) or kind not in STRUCTURES:
            raise InputError(f"the checkpoint uses the structure {kind!r}, which this version of winnow lacks; upgrade winnow")
    return layers


def install(model: Any, layers: dict[str, dict[str, Any]]) -> None:
    """Replace every module in `layers` by an empty module of its layout, and tie shared tensors.

    Raises InputError, naming the module, if a layout does not fit the module.
    """
    shapes = {}
    for name, layout in layers.items():
        dense = _replaced(model, name, layout.get("embeddings") is True)
        shapes[name] = matrix_shape(dense)
        try:
            _check_numbers(layout, sum(shapes[name]) or 1 << 31)
            with torch.device("meta"):
                module: Any = STRUCTURES[layout["kind"]].module(layout, dense)
                if rank := layout.get("added"):
                    module.add(torch.empty(rank, module.in_features), torch.empty(module.out_features, rank))
        except MALFORMED as error:
            raise _misfit(name, layout, error) from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    for name, layout in layers.items():
        try:
            shared = STRUCTURES[layout["kind"]].share(model, name, layout)
            if STRUCTURES[layout["kind"]].bias_name is not None:
                _check_shape(model.get_submodule(name), *shapes[name])
        except MALFORMED as error:
            raise _misfit(name, layout, error) from error
        model.all_tied_weights_keys.update(shared)


def _misfit(name: str, layout: dict[str, Any], error: Exception) -> InputError:
    what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    return InputError(f"the checkpoint's config: the layout of {name} ({layout['kind']}) does not fit the model: {what}")


def _replaced(model: Any, name: str, embeddings: bool) -> nn.Module:
    """The module `name`, which must be a matrix or an activation, or the token embeddings if its layout is that of embeddings."""
    try:
        dense = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the checkpoint's config names {name}, which {type(model).__name__} does not have") from error
    leaf = not list(dense.children()) and not list(dense.parameters())
    is_matrix = isinstance(dense, nn.Embedding) if embeddings else isinstance(dense, nn.Linear | Conv1D) or leaf
    if not name or not is_matrix or (embeddings and dense is not model.get_input_embeddings()):
        raise InputError(f"the checkpoint's config names {name or 'the whole model'}, which is not a compressible matrix")
    return dense


def matrix_shape(dense: nn.Module) -> tuple[int, int]:
    """(out, in) of the module of a matrix, (vocabulary, width) of embeddings; zeros for other modules."""
    if isinstance(dense, nn.Linear):
        return dense.out_features, dense.in_features
    if hasattr(dense, "num_embeddings"):  # also of rounded ones
        return cast(nn.Embedding, dense).num_embeddings, cast(nn.Embedding, dense).embedding_dim
    return (dense.nf, dense.nx) if isinstance(dense, Conv1D) else (0, 0)


def _check_numbers(value: Any, limit: int) -> None:
    """Raise ValueError for a number in a layout that is not between 0 and `limit`, and for a list longer than `limit`."""
    if isinstance(value, dict | list):
        if len(value) > limit:
            raise ValueError(f"a list of {len(value)} entries")
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part, limit)
    elif isinstance(value, float) or (isinstance(value, int) and not 0 <= value <= limit):
        raise ValueError(f"a size of {value}, but at most {limit} is possible")


def _check_shape(module: nn.Module, rows: int, columns: int) -> None:
    """Raise ValueError unless the module maps `columns` inputs to `rows` outputs, or as embeddings has `rows` of them; with meta
    tensors, without computation."""
    if hasattr(module, "num_embeddings"):
        if (found := matrix_shape(module)) != (rows, columns):
            raise ValueError(f"it has {found[0]} x {found[1]} numbers, not {rows} x {columns}")
        return
    found = tuple(module(torch.empty(1, columns, device="meta")).shape)
    if found != (1, rows):
        raise ValueError(f"it has {found[-1]} outputs, not {rows}")


def moved(layers: dict[str, dict[str, Any]], source: str, target: str) -> dict[str, dict[str, Any]]:
    """The same layouts with the prefix `source` of module names, also in references, replaced by `target`."""

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rename(part) for key, part in value.items()}
        if isinstance(value, str) and any(value[:end] in layers for end in _ends(value)):
            return target + value.removeprefix(source)
        return value

    return {target + name.removeprefix(source): rename(layout) for name, layout in layers.items()}


def _ends(name: str) -> list[int]:
    """The positions at which a component of a dotted name ends."""
    return [i for i, letter in enumerate(name) if letter == "."] + [len(name)]
