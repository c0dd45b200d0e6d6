from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from winnow.recovery.base import Recovery, RecoveryOptions
from winnow.training.options import Tuning

if TYPE_CHECKING:
    from winnow.recovery.base import Given


class Finetune(Recovery):
    """Fine-tuning after compression with the labels of a classification task: all weights are trained on its train rows, as by a
    model's `finetune` before compression, with separate options."""

    reference = "fine-tuning after compression, as in FWSVD, arXiv 2207.00112"

    class Options(Tuning, RecoveryOptions):
        whole: ClassVar[bool] = True
        kind: Literal["finetune"] = Field(description="finetune")

    def recover(self, given: Given) -> dict[str, Any]:
        from winnow.recovery.finetune import finetune_again

        return finetune_again(given)
