"""What the sections of the configuration are typed with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Strict(BaseModel):
    """A preset: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
