from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.recovery.base import Recovery, RecoveryOptions

if TYPE_CHECKING:
    from winnow.recovery.base import Given


class NoRecovery(Recovery):
    """The compressed checkpoint is evaluated without recovery."""

    reference = "none"

    class Options(RecoveryOptions):
        kind: Literal["none"] = Field(description="none")
        after: None = Field(default=None, description="always null")

    def recover(self, given: Given) -> dict[str, Any]:
        return {}
