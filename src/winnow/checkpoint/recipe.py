"""The content of recipe.yaml, as types. Imported for annotations alone, so that an edit repeats no job."""

from __future__ import annotations

from typing import NotRequired

from winnow.io.records import Dequantized
from winnow.io.specs import Preset, Presets


class Recipe(Presets):
    """How the groups of a checkpoint were made."""

    winnow: str  # version
    names: dict[str, str]  # of the presets
    dense_bytes: int
    stored_bytes: int
    sizes: dict[str, int]  # {group: size}
    left_dense: NotRequired[dict[str, int]]  # {group of experts: its calibration tokens, which are too few}
    kept_dense: NotRequired[dict[str, int]]  # {group that the allocation keeps dense: bytes}


class WrittenRecipe(Recipe):
    """The same of all weights, as stored."""

    model_stored_bytes: int
    model_dense_bytes: int
    dequantized: NotRequired[Dequantized]  # of a model from a GGUF file
    format_version: NotRequired[int]
    recovery: NotRequired[Preset]
