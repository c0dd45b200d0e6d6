"""The interface of an allocation: from a share of bytes to a size (or dense) for every group of matrices.

`kinds` is imported when a workflow is planned, so solver libraries are only imported inside functions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from winnow.errors import InputError
from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from winnow.allocation.groups import Group
    from winnow.allocation.times import Timing
    from winnow.structures.base import Runtime

Objective = Literal["predicted", "metric", "relative"]
OBJECTIVE = (
    "what is summed over matrices: `predicted`, the predicted loss in nats (needs a backward pass); `metric`, the error that the "
    "method minimises; `relative`, this error as a share of each matrix's largest"
)
ROUNDS = (
    "number of times the loss is predicted again around the compressed model, only for `predicted`; the round with the lowest "
    "loss on the calibration windows is kept. Each is a forward and a backward pass over them, for every method and budget"
)
LEAVE_DENSE = "whether a matrix may stay dense, without loss and with its dense bytes"


class AllocationOptions(Options):
    pass


class Predicting(AllocationOptions):
    """Options of an allocation that sums losses over matrices."""

    kind: str
    objective: Objective = Field("predicted", description=OBJECTIVE)
    leave_dense: bool = Field(True, description=LEAVE_DENSE)
    rounds: int = Field(0, ge=0, le=8, description=ROUNDS)

    @model_validator(mode="after")
    def _rounds_predict(self) -> Predicting:
        if self.rounds and self.objective != "predicted":
            raise ValueError("`rounds` need `objective: predicted`")
        return self


@dataclass(frozen=True)
class Choice:
    """{group name: size, or None if it stays dense}, and the record of the choice for allocation.json."""

    sizes: dict[str, int | None]
    facts: dict[str, Any] = field(default_factory=dict)


class Allocation(Plugin):
    """A way to distribute a budget over groups of matrices. Deterministic, and independent of the order of the groups."""

    chooses: ClassVar[bool] = False  # whether it can choose between alternative groups
    learns: ClassVar[bool] = False  # whether sizes are trained by a separate job (`learn_sizes`), which starts from `allocate`
    libraries: ClassVar[tuple[str, ...]] = ()  # whose version can change its choice
    Options: ClassVar[type[AllocationOptions]]

    def predicts(self) -> bool:
        """Whether it needs the predicted loss of every size, and so a backward pass over the calibration windows."""
        return getattr(self.options, "objective", None) == "predicted"

    def rounds(self) -> int:
        """The number of times the loss is predicted again, around the previously allocated model."""
        return getattr(self.options, "rounds", 0)

    def timing(self) -> Timing | None:
        """The bound on the measured time of the chosen sizes, and how it is measured."""
        return getattr(self.options, "time", None)

    def restriction(self) -> str:
        """What it is restricted to besides the bytes, for messages."""
        timing, runtime = self.timing(), self.runtime()
        parts = [f"`runtime: {runtime}`"] if runtime != "any" else []
        parts += [f"`time.keep: {timing.keep}`"] if timing else []
        return f" with {' and '.join(parts)}" if parts else ""

    def runtime(self) -> Runtime:
        """The runtime whose sizes it is restricted to."""
        return getattr(self.options, "runtime", "any")

    @abstractmethod
    def allocate(self, groups: list[Group], keep: float) -> Choice:
        """Sizes whose bytes are at most `keep` of the dense bytes of the groups, and as close to it as possible; for alternative
        groups, those of the chosen ones. If even the smallest sizes store more, these are returned and the caller raises an
        error. Raises InputError for a group without a size."""


ALLOCATIONS: Registry[Allocation] = Registry("winnow.allocation.kinds", Allocation)


def losses(group: Group, objective: str) -> list[float]:
    """The loss of every size of a group in units of the objective. Raises InputError if it is unknown."""
    if objective == "metric":
        return group.error
    if objective == "relative":
        return [error / group.error[0] for error in group.error] if group.error[0] > 0 else group.error
    if group.predicted is None:
        raise InputError(
            f"the loss of {group.describe()} is not predicted: experts of a mixture have no gradients; remove them from the "
            "budget's targets, or choose another `objective` or allocation"
        )
    return group.predicted


def smallest(groups: list[Group]) -> dict[str, int | None]:
    """Size 1 for every group, or dense if the structure never stores less."""
    return {g.name: 1 if g.largest else None for g in groups}


def stored_bytes(groups: list[Group], sizes: dict[str, int | None]) -> int:
    """The bytes of the groups in `sizes`, including dense ones."""
    return sum(g.bytes(sizes[g.name]) for g in groups if g.name in sizes)


def counted_once(groups: list[Group]) -> list[Group]:
    """Groups that have every matrix once: every matrix of alternatives is also in a group by itself."""
    seen: set[str] = set()
    found = []
    for g in sorted(groups, key=lambda g: len(g.matrices)):
        names = {m.name for m in g.matrices}
        if not names & seen:
            found.append(g)
        seen |= names
    return found


def dense_bytes(groups: list[Group]) -> int:
    """The dense bytes of the groups' matrices, each counted once."""
    return sum(g.dense for g in counted_once(groups))


def spend(
    groups: list[Group], sizes: dict[str, int | None], allowed: float, costs: dict[str, list[float]], losing: bool = True
) -> None:
    """Spend the remaining bytes of `allowed` in single size steps, each on the group with the largest gain per byte that still
    fits; changes `sizes`. Without `losing`, no step is taken to a size that costs more, as forms with more bytes may."""
    left = allowed - stored_bytes(groups, sizes)
    while True:
        best: tuple[float, str, int, int] | None = None  # minus the gain, group, next size, its additional bytes
        for g in groups:
            size = sizes.get(g.name)
            if size is None:
                continue
            larger = next((s for s in range(size + 1, g.largest + 1) if s not in g.left_out), None)
            if larger is None:
                continue
            more = g.bytes(larger) - g.bytes(size)
            gain = (costs[g.name][size] - costs[g.name][larger]) / max(1, more)
            if more <= left and (losing or gain >= 0) and (best is None or (-gain, g.name) < best[:2]):
                best = (-gain, g.name, larger, more)
        if best is None:
            return
        sizes[best[1]] = best[2]
        left -= best[3]
