"""Base types of presets."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Longest name of a preset. File names have at most 255 bytes, and also contain suffixes of derived presets
# (`.random.neuron_slice`), a digest, and, while being written, `.` and `.safetensors.partial-` with a number.
LONGEST = 150
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST)]


class Strict(BaseModel):
    """A preset: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
