"""What the sections of the configuration are typed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from winnow.architectures import Target

# Letters of a preset's name. A file's name has 255 bytes at most, and one that is called by a preset holds more: what is
# derived of it (`.random.neuron_slice`), a digest, and while it is written `.` and `.safetensors.partial-` with a number.
LONGEST = 150
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST)]


class Strict(BaseModel):
    """A preset: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
