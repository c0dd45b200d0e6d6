"""What the study measures, as types. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import TypedDict

from winnow.studies.records import Found

Sweep = TypedDict("Sweep", {"lambda": float, "error": float, "distance": float})  # distance to the anchors


class Errors(TypedDict):
    """Squared errors relative to squared norms."""

    weights: float
    outputs: float


class Chained(Found):
    layers: int
    width: int
    k: int
    sweep: list[Sweep]
    anchors_error: float
    tying: dict[str, float]
    errors: dict[str, Errors]  # by form
    stored: dict[str, float]  # shares of the dense numbers
