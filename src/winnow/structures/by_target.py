"""`by_target`: a different structure for every target, for example one for attention and one for the FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.models.architectures import Matrix, Target, disjoint, named_by
from winnow.numerics.operations import Operations
from winnow.structures.base import AnyStructure, Fit, Part, Problem, Runtime, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.calibration.clusters import Clustering


class ByTarget(Structure):
    """The matrices of every target are stored by its structure, all in the method's metric; matrices without a target are
    unsupported. With `rank_fraction: {target: share}` in the budget, targets can also have different ranks."""

    reference = "combined attention and FFN compression (HyperTensor Paper VIII)"
    stores = "what the structure of each target stores"
    formula = "that of each target's structure"
    bias_name = "bias"  # unused: `bias_of` has the names

    class Options(StructureOptions):
        kind: Literal["by_target"]
        parts: dict[Target, AnyStructure] = Field(  # resolved by the registry, which knows them all
            default_factory=lambda: {"attention": {"kind": "shared_basis"}, "ffn": {"kind": "low_rank"}},
            validate_default=True,
            min_length=1,
            description="`{target: structure}`; targets as in a budget",
        )

        @model_validator(mode="after")
        def _of_matrices(self) -> ByTarget.Options:
            from winnow.structures.base import STRUCTURES

            disjoint(self.parts)
            for part in self.parts.values():
                if STRUCTURES[part.kind].bias_name is None:
                    raise ValueError(f"{part.kind} replaces a whole FFN, so it cannot be the structure of a target")
                if STRUCTURES[part.kind].optimised_at_size:
                    raise ValueError(f"{part.kind} couples layers, so it cannot be combined with another structure")
            clusterings = [STRUCTURES.build(part.model_dump()).clustering() for part in self.parts.values()]
            if len({c.model_dump_json() for c in clusterings if c}) > 1:
                raise ValueError("the parts have different clusterings; a method has only one assignment of clusters")
            return self

    options: Options

    def __init__(self, options: StructureOptions):
        from winnow.structures.base import STRUCTURES

        super().__init__(options)
        self.parts = {target: STRUCTURES.build(part.model_dump()) for target, part in self.options.parts.items()}
        self.predicts = all(part.predicts for part in self.parts.values())
        self.timed = all(part.timed for part in self.parts.values())
        self.outer = any(part.outer for part in self.parts.values())
        self.engines = tuple(dict.fromkeys(engine for part in self.parts.values() for engine in part.engines))

    def part(self, matrix: Matrix) -> Structure:
        """The structure of a matrix. KeyError if no target names it."""
        return self.parts[str(named_by(matrix.role, self.parts))]

    def bias_of(self, matrix: Matrix) -> str | None:
        return self.part(matrix).bias_of(matrix)

    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(need for part in self.parts.values() for need in part.needs()))

    def clustering(self) -> Clustering | None:
        return next((c for c in (part.clustering() for part in self.parts.values()) if c), None)

    def control(self) -> StructureOptions | None:
        controls = {target: part.control() for target, part in self.parts.items()}
        if not any(controls.values()):
            return None
        return self.options.model_copy(update={"parts": {t: c or self.options.parts[t] for t, c in controls.items()}})

    def untrainable(self) -> str | None:
        reasons = [part.untrainable() for part in self.parts.values()]
        return reasons[0] if all(reasons) else None

    def refits(self) -> bool:
        return any(part.refits() for part in self.parts.values())

    def rounds(self) -> bool:
        return any(part.rounds() for part in self.parts.values())

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        found = []
        for target, part in self.parts.items():
            found += part.groups(part.supported([m for m in matrices if named_by(m.role, self.parts) == target]))
        return sorted(found, key=lambda group: group[0].layer)  # so that a shard reads the files of few layers

    def limit(self, group: list[Matrix]) -> int:
        return self.part(group[0]).limit(group)

    def whole(self, group: list[Matrix]) -> int:
        return self.part(group[0]).whole(group)

    def largest(self, group: list[Matrix]) -> int:
        return self.part(group[0]).largest(group)

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return self.part(group[0]).numbers(group, size, tensors)

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        return self.part(group[0]).runs(group, size, runtime)

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return self.part(group[0]).index_bytes(group, size)

    def metric_of_error(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        return self.part(problem.group[0]).metric_of_error(problem)

    def fit(self, problem: Problem, largest: int) -> Fit:
        return self.part(problem.group[0]).fit(problem, largest)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        return self.part(group[0]).work(group, needs)

    def predicting(self, group: list[Matrix]) -> float:
        return self.part(group[0]).predicting(group)

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        return self.part(problem.group[0]).predicted(problem, tensors)

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        return self.part(group[0]).layouts(group, size)

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return self.part(group[0]).timed_sizes(group, count)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        return self.part(group[0]).stored(group, tensors, size)

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        """The module of the part with this layout: a checkpoint names the kind of the part, never `by_target`."""
        from winnow.structures.base import STRUCTURES

        return STRUCTURES[layout["kind"]].module(layout, dense)

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        from winnow.structures.base import STRUCTURES

        return STRUCTURES[layout["kind"]].share(model, name, layout)
