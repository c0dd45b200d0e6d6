from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.recovery.base import OnWindows, Recovery

if TYPE_CHECKING:
    from winnow.recovery.base import Given


class Sequential(Recovery):
    """Low-rank factors refitted in closed form and rounded matrices rounded again with error feedback, matrix by matrix in the
    order of the forward pass, on the inputs that occur in the compressed model, without training. A block is left unchanged if
    this does not reduce its error on the held-out windows; with `outputs: gradient`, the whole model if the KL divergence to the
    dense model does not decrease. Objectives 4 and 2 of AA-SVD, arXiv 2604.02119; for rounding, `anchored` is the objective of
    GPTAQ, arXiv 2504.02692. A ridge preserves directions that hardly occur in the calibration text."""

    reference = "objectives 4 and 2 of AA-SVD, arXiv 2604.02119; GPTAQ, arXiv 2504.02692"
    version = 2

    class Options(OnWindows):
        kind: Literal["sequential"] = Field(description="sequential")
        objective: Literal["anchored", "shifted"] = Field(
            "anchored",
            description="anchored: the dense matrix's output in the dense model; shifted: its output on the compressed one's "
            "inputs",
        )
        outputs: Literal["equal", "gradient"] = Field(
            "equal",
            description="equal: all errors of a matrix's output have equal weight, as published; gradient: by the second "
            "moment of the gradient, as in the metric `two_sided`, and the model is evaluated by its predictions, not by its "
            "blocks",
        )
        biases: Literal["kept", "fitted"] = Field(
            "kept", description="fitted: existing biases correct the mean error of the outputs; no bias is added"
        )
        rounded: Literal["fixed", "codes"] = Field(
            "codes", description="what of rounded matrices is determined again: nothing; their codes, with the stored scales"
        )
        batch: int = Field(8, ge=1, description="windows per forward pass")
        held_out: float = Field(
            0.125, gt=0, lt=1, description="share of the calibration windows that are held out for evaluating blocks"
        )

        @property
        def reads_gradients(self) -> bool:
            return self.outputs == "gradient"

    def recover(self, given: Given) -> dict[str, Any]:
        from winnow.recovery.sequential import refit

        return refit(given)
