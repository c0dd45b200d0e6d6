"""Ranks and shares of ranks of a budget: one for all chosen matrices, or one for every target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from winnow.models.architectures import Target

ONE, EACH = "one for all", "by target"  # how ranks are given; parts of the places of errors


def _by_target(number: Any) -> Any:
    """A number for all chosen matrices, or one for every target."""
    each = Annotated[dict[Target, number], Tag(EACH)]
    return Annotated[Annotated[number, Tag(ONE)] | each, Discriminator(lambda given: EACH if isinstance(given, dict) else ONE)]


if TYPE_CHECKING:
    Ranks = int | dict[str, int]
    Shares = float | dict[str, float]
else:
    Ranks = _by_target(Annotated[int, Field(ge=1)])
    Shares = _by_target(Annotated[float, Field(gt=0, le=1)])
