from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.recovery.base import OnWindows, Recovery

if TYPE_CHECKING:
    from winnow.recovery.base import Task


class Sequential(Recovery):
    """Low-rank factors fitted anew in closed form, matrix by matrix in the order that the model computes, to the inputs that the
    compressed model makes; nothing is trained. A block is as it was where this brings its output no nearer to the dense block's
    on the held-out windows; with `outputs: gradient` the model, where its predictions come no nearer to the dense model's.
    Objectives 4 and 2 of AA-SVD, arXiv 2604.02119; a ridge keeps what hardly occurs in the calibration text as it was."""

    reference = "objectives 4 and 2 of AA-SVD, arXiv 2604.02119"

    class Options(OnWindows):
        kind: Literal["sequential"] = Field(description="sequential")
        objective: Literal["anchored", "shifted"] = Field(
            "anchored",
            description="anchored: the dense matrix's output in the dense model; shifted: on the compressed one's inputs",
        )
        outputs: Literal["equal", "gradient"] = Field(
            "equal",
            description="equal: all errors of a matrix's output count alike, as published; gradient: by the second moment of the "
            "loss's gradient in them, as in the metric `two_sided`, and the model is judged by its predictions, not by its "
            "blocks",
        )
        biases: Literal["kept", "fitted"] = Field(
            "kept", description="fitted: biases that matrices have take up the mean of their outputs' errors; none is added"
        )
        batch: int = Field(8, ge=1, description="windows at a time")
        held_out: float = Field(0.125, gt=0, lt=1, description="share of the calibration windows that only judge the blocks")

        @property
        def reads_gradients(self) -> bool:
            return self.outputs == "gradient"

    def recover(self, task: Task) -> dict[str, Any]:
        from winnow.recovery.sequential import recover

        return recover(task)
