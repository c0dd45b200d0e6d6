"""`learned`: sizes by gradient descent on the loss of the whole model, starting from those of another allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from winnow.allocation.base import Allocation, AllocationOptions, Choice
from winnow.allocation.kinds.ilp import IntegerProgramme
from winnow.allocation.kinds.uniform import Uniform

if TYPE_CHECKING:
    from winnow.allocation.groups import Group


class Learned(Allocation):
    """Every matrix has a cut through its singular directions and a gate to its dense self; Adam moves both to lessen the KL
    divergence of the compressed model from the dense one on calibration windows, at bytes that are the budget's in every step.
    Halfway the gates are decided, and the cuts learn on. The sizes that are best on windows held out are kept, those of the
    start where none are better; learned.json has the record. For structures that are cut from one product of two factors; see
    `winnow.allocation.learning`."""

    reference = "ARA, arXiv 2510.19389 (ratio 1 a choice of its own); LLRC, arXiv 2512.13733: gradients of masks over directions"
    libraries = IntegerProgramme.libraries
    learns = True

    class Options(AllocationOptions):
        kind: Literal["learned"]
        start: Literal["uniform", "ilp"] = Field(
            "uniform", description="the allocation that it starts from; `ilp` has its default options and needs predicted losses"
        )
        steps: int = Field(200, ge=1, description="steps of Adam; all steps see the calibration windows without those held out")
        batch: int = Field(4, ge=1, description="windows per step")
        rate: float = Field(0.1, gt=0, description="learning rate of cuts and gates (log-odds) at its height; it falls to 0")
        warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the rate grows to its full height")
        held_out: float = Field(0.125, gt=0, lt=1, description="share of the calibration windows that only choose the sizes")
        every: int = Field(20, ge=1, description="steps between two looks at the held-out windows")
        patience: int | None = Field(None, ge=1, description="looks without a new best after which learning ends; never if null")
        seed: int = Field(0, ge=0, description="order of the windows")

    options: Options

    def predicts(self) -> bool:
        return self.options.start == "ilp"

    def allocate(self, groups: list[Group], keep: float) -> Choice:
        """Where learning starts, without a step of it."""
        cls = {"ilp": IntegerProgramme, "uniform": Uniform}[self.options.start]
        return cls(cls.Options.model_validate({"kind": self.options.start})).allocate(groups, keep)
