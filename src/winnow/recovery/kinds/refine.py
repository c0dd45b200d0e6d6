from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.recovery.base import Recovery, Trained

if TYPE_CHECKING:
    from winnow.recovery.base import Given


class Refine(Recovery):
    """Block by block, in order: the compressed block is trained to output what the dense block outputs, on inputs from the
    refined blocks before it. No labels and no loss of the model are used. A block is left unchanged if training does not reduce
    its held-out loss. As block refinement in AA-SVD, arXiv 2604.02119."""

    reference = "block refinement of AA-SVD, arXiv 2604.02119"
    version = 2
    streams = True

    class Options(Trained):
        kind: Literal["refine"] = Field(description="refine")
        objective: Literal["anchored", "shifted"] = Field(
            "anchored",
            description="anchored: the dense block's output in the dense model; shifted: its output on the compressed block's "
            "inputs",
        )
        rate: float = Field(
            1e-3,
            gt=0,
            description="peak learning rate, lower for blocks whose held-out loss is below 0.002 of the target's mean square; "
            "cosine decay to 0",
        )
        layers: list[int] | None = Field(None, min_length=1, description="the layers to refine; null: all")
        patience: int | None = Field(
            5,
            ge=1,
            description="early stopping: evaluations on held-out windows without improvement before a block is finished; null: "
            "never",
        )

    def recover(self, given: Given) -> dict[str, Any]:
        from winnow.recovery.refine import refine_blocks

        return refine_blocks(given)
