"""`mixed`: for every FFN and every attention matrix the structure that loses least, chosen together with its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field, model_validator

from winnow.models.architectures import Matrix
from winnow.structures.base import AnyStructure, Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Mixed(Structure):
    """An FFN is stored by a member that replaces it as a whole, or each of its matrices by one that replaces matrices, or dense;
    an attention matrix by one of the latter, or dense. `ilp` chooses by predicted loss; other allocations cannot. Every member is
    fitted as a method of its own, in the metric of this one where it takes one, and shares factors with such a method."""

    reference = "a choice among structures by integer programme, on predicted losses"
    stores = "what the chosen members store"
    formula = "that of the chosen members"
    bias_name = "bias"  # of no matrix: the members have the names

    class Options(StructureOptions):
        kind: Literal["mixed"]
        members: list[AnyStructure] = Field(  # resolved by the registry, which knows them all
            default_factory=lambda: [
                {"kind": "gauge_fixed"},
                {"kind": "neuron_slice", "criterion": "loss"},
                {"kind": "affine_block"},
            ],
            validate_default=True,
            min_length=2,
            description="the structures to choose between, each kind once; they must have predicted losses",
        )

        @model_validator(mode="after")
        def _comparable(self) -> Mixed.Options:
            from winnow.structures.base import STRUCTURES

            kinds = [member.kind for member in self.members]
            for kind in kinds:
                if kinds.count(kind) > 1:
                    raise ValueError(f"members hold {kind} twice; allocation.json tells members by their kind")
                if not STRUCTURES[kind].predicts:
                    raise ValueError(f"{kind} has no predicted losses to be chosen by; take it out of the members")
            if all(STRUCTURES[kind].objective != "metric" for kind in kinds):
                raise ValueError("no member replaces single matrices, as low_rank does; add one, for what is in no FFN")
            return self

    options: Options

    def __init__(self, options: StructureOptions):
        from winnow.structures.base import STRUCTURES

        super().__init__(options)
        self.members = {f"@{member.kind}": STRUCTURES.build(member.model_dump()) for member in self.options.members}

    def alternatives(self) -> dict[str, Structure]:
        return self.members

    def not_dense(self) -> str | None:
        return next((reason for reason in (member.not_dense() for member in self.members.values()) if reason), None)

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        """None: its members fit theirs."""
        return []

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> NoReturn:
        raise NotImplementedError("its members count their own")

    def fit(self, problem: Problem, largest: int) -> Fit:
        raise NotImplementedError("its members are fitted each by itself")

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        raise NotImplementedError("its members store their own")

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        raise ValueError("a checkpoint names the kinds of the members, never this one's")
