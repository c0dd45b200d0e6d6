"""`mixed`: for every FFN and every attention matrix the structure with the lowest predicted loss, chosen with its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field, model_validator

from winnow.models.architectures import Matrix
from winnow.structures.base import AnyStructure, Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class Mixed(Structure):
    """An FFN is stored by one member as a whole, or each of its matrices by a member for single matrices, or dense; an attention
    matrix by a member for single matrices, or dense; embeddings and head by `rounded`, if a budget targets them. Only the
    allocation `ilp` can choose, by predicted loss. Every member is fitted like a method of its own, in this method's metric if it
    uses one, and shares its factors with such a method."""

    reference = "choice of structures by an integer programme on predicted losses"
    stores = "what the chosen members store"
    formula = "that of the chosen members"
    bias_name = "bias"  # unused: the members have the names

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
                    raise ValueError(f"duplicate member {kind}; members are identified by their kind in allocation.json")
            for member in self.members:
                if not STRUCTURES.build(member.model_dump()).predicts:
                    raise ValueError(f"{member.kind} has no predicted losses to choose by; remove it from the members")
            if all(STRUCTURES[kind].objective != "metric" for kind in kinds):
                raise ValueError("no member replaces single matrices; add one, such as low_rank, for matrices outside of FFNs")
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
        """None: its members have the groups."""
        return []

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> NoReturn:
        raise NotImplementedError("counted by the members")

    def fit(self, problem: Problem, largest: int) -> Fit:
        raise NotImplementedError("fitted by the members")

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        raise NotImplementedError("stored by the members")

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        raise ValueError("a checkpoint names the kinds of the members, never `mixed`")
