"""What presets are typed with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Letters of a preset's name. A file's name has 255 bytes at most, and one that is called by a preset holds more: what is
# derived of it (`.random.neuron_slice`), a digest, and while it is written `.` and `.safetensors.partial-` with a number.
LONGEST = 150
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST)]


class Strict(BaseModel):
    """A preset: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
