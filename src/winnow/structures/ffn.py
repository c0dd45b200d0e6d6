"""What structures that replace a whole FFN have in common."""

from __future__ import annotations

from winnow.architectures import Matrix, ffn_groups
from winnow.structures.base import Structure, StructureOptions


class FfnStructure(Structure):
    """Fits gate, up and down of a layer together, and stores their biases itself."""

    bias_name = None

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        return ffn_groups(matrices)

    def limit(self, group: list[Matrix]) -> int:
        return group[-1].shape[1]  # the neurons

    def control(self) -> StructureOptions | None:
        """With neurons chosen at random, where the options have a criterion."""
        criterion = getattr(self.options, "criterion", "random")
        return None if criterion == "random" else self.options.model_copy(update={"criterion": "random"})
