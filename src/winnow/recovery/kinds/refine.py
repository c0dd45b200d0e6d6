from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.recovery.base import Recovery, Trained

if TYPE_CHECKING:
    from winnow.recovery.base import Task


class Refine(Recovery):
    """Block by block, in order: the compressed block gets what the refined model below it produces, and learns what the dense
    block gives. No label and no loss of the model is used. A block is as it was where training makes it no better on the
    held-out windows. As block refinement in AA-SVD, arXiv 2604.02119."""

    reference = "block refinement of AA-SVD, arXiv 2604.02119"

    class Options(Trained):
        kind: Literal["refine"] = Field(description="refine")
        objective: Literal["anchored", "shifted"] = Field(
            "anchored",
            description="anchored: the dense block's output in the dense model; shifted: on the compressed block's inputs",
        )
        rate: float = Field(
            1e-3,
            gt=0,
            description="learning rate at its height, less for blocks whose held-out loss is below 0.002 of the target's mean "
            "square; it falls to 0 as a cosine",
        )
        patience: int | None = Field(
            5, ge=1, description="looks without a new best after which a block is finished; never if null"
        )

    def recover(self, task: Task) -> dict[str, Any]:
        from winnow.recovery.refine import recover

        return recover(task)
