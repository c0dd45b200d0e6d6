"""The interface of a stage: what the result of a rule's job depends on, besides its input files.

A stage has the name of its file, of its rule, of its script and of its folder of logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.metrics.base import METRICS
from winnow.numerics.operations import NONE, Operations
from winnow.planning.fingerprints import versions
from winnow.planning.load import BASE, Load, Work
from winnow.registry import Plugin, Registry
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.plan import Plan

TORCH = ("torch", "numpy", "safetensors")
HUGGING_FACE = (*TORCH, "transformers", "tokenizers")
TABLES = ("numpy", "pandas", "pyarrow")
TASKS = ("datasets", "lm-eval")
TEMPLATES = Path(__file__).parents[2] / "reporting" / "templates"
OF_STATISTICS = {"precision", "first_token", "gradient_labels"}  # options of a calibration that do not change its tokens


class Stage(Plugin):
    """A stage of a plan. All methods take the wildcards of a job: {"model": its label, ...}."""

    libraries: ClassVar[tuple[str, ...]] = ()  # whose version can change what it writes
    streams: ClassVar[bool] = False  # whether a job can hold a block of the model at a time
    on_device: ClassVar[bool] = False  # whether its rules ask for a GPU
    intermediate: ClassVar[bool] = False  # whether its results are statistics, factors or predictions, of which others are made
    others: ClassVar[tuple[str, ...]] = ()  # rules of the same stage beside the one of its name

    def __init__(self, plan: Plan, of: str = ""):
        """`of`: the kind of plug-in that it is for, where there is a stage for each (see `kinds`)."""
        self.plan, self.of = plan, of

    @classmethod
    def kind(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def kinds(cls) -> list[str]:
        """Kinds of plug-ins that have a stage of their own by the same script; by default one stage for all."""
        return [""]

    @property
    def name(self) -> str:
        return f"{self.kind()}_{self.of}" if self.of else self.kind()

    @property
    def rules(self) -> list[str]:
        """The rules whose jobs are of this stage."""
        return [self.name, *self.others]

    def spec(self, w: dict[str, str]) -> Mapping[str, Any]:
        """Parameters, as builtin types."""
        return {}

    def code(self, w: dict[str, str]) -> list[str]:
        """Modules that the script imports by the name of a kind, which its import statements do not show."""
        return self.plan.structures_of(w["method"]) if "method" in w else []

    def uses(self, w: dict[str, str]) -> tuple[str, ...]:
        """Libraries that this job uses and others of the stage do not."""
        return ()

    def files(self, w: dict[str, str]) -> dict[str, str]:
        """{file that no rule makes and that the job reads: SHA-256 of its content now}"""
        return {}

    def work(self, load: Load) -> list[Work]:
        """Peak memory, disk and operations of the jobs for a model, by `needed`; none where nothing is forecast."""
        return []

    # What several stages say.

    def needed(
        self,
        load: Load,
        jobs: int,
        memory: float,
        disk: float = 0.0,
        operations: Operations = NONE,
        base: float = BASE,
        rule: str | None = None,
        temporary: tuple[float, float] = (0.0, 0.0),
        on_device: bool | None = None,
    ) -> list[Work]:
        """The work of some jobs: bytes of memory of the largest beside `base`, that of the process; bytes of results and
        operations of all together. `temporary`: bytes of files that are removed at the end, of the largest job at a time and
        written by all together."""
        host = load.host if (self.on_device if on_device is None else on_device) else None
        needs = (base + memory, disk, operations, *temporary, host)
        return [Work(rule or self.name, load.name, jobs, *needs, self.streams, self.intermediate)] if jobs else []

    def collecting(
        self,
        load: Load,
        calibration: str,
        memory: float,
        disk: tuple[float, float, float],
        operations: Operations,
        base: float,
    ) -> list[Work]:
        """The work of a pass over a calibration's windows, of one job or of those that share them. `disk`: bytes of moments, that
        each of them writes; and of other files of all windows, at a time and written. Those that share windows may run side by
        side, and their moments are there until they are merged: temporary, of all of them together."""
        parts, (moments, held, written) = len(self.plan.parts(load.label, self.plan.labels["calibrations"][calibration])), disk
        if not parts:
            return self.needed(load, 1, memory, moments, operations, base, temporary=(held, written))
        temporary = (parts * moments + held, parts * moments + written)
        return self.needed(load, parts, memory, 0.0, operations, base, f"{self.name}_part", temporary)

    def dtype(self, w: dict[str, str]) -> str:
        return self.plan.preset("models", w["model"]).dtype

    def method(self, w: dict[str, str]) -> specs.Method:
        """The method as its factors depend on it."""
        method = self.plan.preset("methods", w["method"])
        return method.model_dump(exclude={"paper", "allocation"}) | {  # the allocation is the budget's by then
            "structure_version": STRUCTURES[method.structure.kind].version,
            "metric_version": METRICS[method.metric.kind].version if method.metric else None,
        }

    def refitting(self, w: dict[str, str]) -> list[str]:
        """The modules of the method's metrics, where its factors are fitted again."""
        return self.plan.metrics_of(w["method"]) if self.plan.refits(w["model"], w["method"]) else []

    def allocation(self, w: dict[str, str]) -> specs.Allocation:
        """The budget's allocation, of whose options the budget tells."""
        allocation = self.plan.allocation(w["budget"])
        return {"version": allocation.version, "libraries": versions(*allocation.libraries)}

    def recovery(self, label: str) -> specs.Preset:
        """The options of a recovery, and in the place of a name those of the one that it goes on from."""
        recovery = self.plan.preset("recoveries", label)
        after = {"after": self.recovery(self.plan.labels["recoveries"][recovery.after])} if recovery.after else {}
        return {**recovery.model_dump(exclude={"after"}), **after}


def source_of(plan: Plan, model: str) -> specs.Source:
    """Where the files of a model (by label) are before it is trained on a task."""
    if plan.dequantized(model):  # what `dequantize` made
        return {"source": f"results/{model}/dequantized", "revision": None}
    preset = plan.preset("models", model)
    return {"source": preset.source, "revision": preset.revision}


STAGES: Registry[Stage] = Registry("winnow.planning.stages", Stage)


def stages_of(plan: Plan) -> dict[str, Stage]:
    """{name: stage} of a plan."""
    found = [cls(plan, of) for cls in STAGES.values() for of in cls.kinds()]
    return {stage.name: stage for stage in found}
