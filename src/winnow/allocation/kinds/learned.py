"""`learned`: sizes by gradient descent on the loss of the whole model, initialised by another allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.allocation.base import Allocation, AllocationOptions, Choice
from winnow.allocation.kinds.ilp import IntegerProgramme
from winnow.allocation.kinds.uniform import Uniform

if TYPE_CHECKING:
    from winnow.allocation.groups import Group


class Learned(Allocation):
    """Every matrix has a cut (a continuous rank) and a gate (probability of staying dense), both trained by Adam to minimise the
    KL divergence of the compressed model from the dense one on calibration windows, with exactly the budget's bytes in every
    step. After half of the steps the gates are fixed and only the cuts are trained. The best sizes on held-out windows are kept,
    or the initial ones if none are better; learned.json has the record. Only for structures that truncate one product of two
    factors; see `winnow.allocation.learning`."""

    reference = "ARA, arXiv 2510.19389 (dense as a separate choice); LLRC, arXiv 2512.13733: gradients of masks over directions"
    libraries = IntegerProgramme.libraries
    learns = True

    class Options(AllocationOptions):
        kind: Literal["learned"]
        start: Literal["uniform", "ilp"] = Field(
            "uniform", description="allocation of the initial sizes; `ilp` has its default options and needs predicted losses"
        )
        steps: int = Field(200, ge=1, description="steps of Adam on the calibration windows, without the held-out ones")
        batch: int = Field(4, ge=1, description="windows per step")
        rate: float = Field(0.1, gt=0, description="peak learning rate of cuts and gates (log-odds), decaying to 0")
        warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps for linear warm-up of the learning rate")
        held_out: float = Field(
            0.125, gt=0, lt=1, description="share of the calibration windows that are held out to choose the sizes"
        )
        every: int = Field(20, ge=1, description="steps between two evaluations on the held-out windows")
        patience: int | None = Field(
            None,
            ge=1,
            description="early stopping: evaluations on held-out windows without improvement before training stops; null: never",
        )
        seed: int = Field(0, ge=0, description="seed of the order of the windows")

    options: Options

    def predicts(self) -> bool:
        return self.options.start == "ilp"

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        """The initial sizes, before training."""
        cls = {"ilp": IntegerProgramme, "uniform": Uniform}[self.options.start]
        return cls(cls.Options.model_validate({"kind": self.options.start})).allocate(groups, keep)
