"""Copies a checkpoint for sharing: one folder with its measured results in the card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from winnow.checkpoint.card import card
from winnow.checkpoint.measured import Measured, text_of
from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, Bundle, file_digest, read_json, write_manifest
from winnow.io.local_paths import clean, named

if TYPE_CHECKING:
    from winnow.checkpoint.recipe import WrittenRecipe


def measured_beside(checkpoint: Path) -> list[Measured]:
    """The evaluations beside a checkpoint in a results folder; empty if there are none.

    An evaluation is used if its provenance has the digests of this checkpoint and of the dense model's evaluation."""
    checkpoint = checkpoint.resolve()
    if not (checkpoint / MANIFEST).is_file():
        return []
    own, found = file_digest(checkpoint / MANIFEST), []
    for path in sorted([*checkpoint.parent.glob("*.json"), *checkpoint.parent.glob("*/*.json")]):
        if (path.parent / MANIFEST).is_file() or b'"per_window"' not in path.read_bytes():  # of a bundle, or no evaluation
            continue
        result = read_json(path)
        made_from = set(result["provenance"]["inputs"].values())
        beside = [parent / "dense" / path.name for parent in checkpoint.parents]
        dense = next((p for p in beside if p.is_file() and file_digest(p) in made_from), None)
        if own in made_from and dense is not None:
            text, source = text_of(result, list(checkpoint.parents))
            found.append(Measured(path.stem.rpartition("-")[0], result, read_json(dense), text, source))
    return found


def read_recipe(checkpoint: Path) -> WrittenRecipe:
    """The content of recipe.yaml. Raises InputError if there is none."""
    path = checkpoint / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a checkpoint as written by the rule `compress` is needed")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def share(checkpoint: Path, directory: Path, measured: list[Measured]) -> None:
    """Copy a checkpoint with the measured results in its card, and without local paths. Raises InputError if the checkpoint is
    damaged."""
    recipe, bundle = read_recipe(checkpoint), Bundle(checkpoint / MANIFEST)
    shutil.copytree(bundle.verify(), directory)
    clean(directory)
    (directory / "README.md").write_text(card(recipe, measured), encoding="utf-8")
    content = {key: value for key, value in bundle.manifest.items() if key not in ("files", "provenance")}
    write_manifest(directory, content, named(bundle.manifest["provenance"]))
