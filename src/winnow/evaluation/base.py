"""The interface of an evaluation: what is measured of a model, dense or compressed.

Files of `kinds` are read when a workflow is planned, so they import torch inside functions only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.models.shape import Shape

FORMATS = (".json", ".jsonl", ".parquet", ".csv")  # of local data of a task
PLAIN = "perplexity"  # the kind of a preset that names none


class EvaluationOptions(Options):
    pass


@dataclass(frozen=True)
class Running:
    """What a forecast of a measurement needs to know."""

    shape: Shape
    unit: int  # bytes of a number in forward passes
    batch_tokens: int
    activations: float  # bytes, of a batch
    streamed: bool
    recovered: bool  # whether the model is a recovered one

    @property
    def loaded(self) -> float:
        """Bytes of the model's numbers."""
        return self.shape.numbers * self.unit


@dataclass(frozen=True)
class Given:
    """What a job measures: the dense model, or with a `checkpoint` that beside it."""

    spec: dict[str, Any]  # `Evaluation.spec`, the preset's `name` and `kind`, the model's `dtype`, the checkpoint's `recovery`
    files: ModelFiles
    checkpoint: Bundle | None
    inputs: Mapping[str, Any]  # paths of what the evaluation `reads`, and `dense`, the result of the dense model
    resources: Mapping[str, int]  # what a batch holds (`Evaluation.batch`), and `stream`
    device: str
    provenance: dict[str, Any]
    output: str  # the path of the result, beside which unfinished work is kept

    def model(self) -> PreTrainedModel:
        """The model that is measured, its files compared with their digests first."""
        from winnow.checkpoint.loading import load_model

        return load_model((self.checkpoint or self.files).verify(), self.spec["dtype"], self.device)

    def dense(self) -> dict[str, Any] | None:
        """The dense model's result; None where that is what is measured."""
        from winnow.io.artifacts import read_json

        return read_json(self.inputs["dense"]) if self.checkpoint else None


class Evaluation(Plugin):
    """What is measured of a model. `measure` runs as a job for every cell; a rule is made for every kind."""

    libraries: ClassVar[tuple[str, ...]] = ()  # beside those that run a model; their versions can change a result
    # What it reads beside the model: `tokens` of its text, `tasks` and `files` of lm-eval, `test` rows and their `facts`.
    reads: ClassVar[tuple[str, ...]] = ()
    paired: ClassVar[bool] = True  # whether it reads the dense model's result
    recovered: ClassVar[bool] = True  # whether the dense model after a recovery is measured as well
    alone: ClassVar[bool] = False  # whether nothing may run beside it
    streams: ClassVar[bool] = False  # whether it can hold a block of the model at a time
    # `module:function` of (rows, results) that makes the table of all cells of the kind. Best in a module of its own: an edit of
    # the table then measures nothing anew.
    table: ClassVar[str | None] = None
    batch: ClassVar[dict[str, int]] = {}  # how much a forward pass takes; changes no number beyond rounding
    # Of a job for the dense model and of one for a compressed model, where it is not forecast.
    memory_mb: ClassVar[tuple[int, int]] = (16000, 16000)
    minutes: ClassVar[int] = 60
    Options: ClassVar[type[EvaluationOptions]]

    def spec(self) -> dict[str, Any]:
        """The options that a result depends on, as builtin types."""
        return self.options.model_dump(exclude={"kind"})

    def work(self, running: Running) -> tuple[float, float, float]:
        """(bytes of memory, bytes of disk, floating-point operations) of a job, for forecasts; by default those of holding the
        model and a batch of activations."""
        return running.loaded + running.activations, 1e5, 0.0

    @classmethod
    @abstractmethod
    def measure(cls, given: Given) -> dict[str, Any]:
        """The numbers of a model. Sizes and the name of the checkpoint are added to them."""

    @classmethod
    def clear(cls, given: Given) -> None:
        """Remove unfinished work, when the result is written."""


EVALUATIONS: Registry[Evaluation] = Registry("winnow.evaluation.kinds", Evaluation)


def with_kind(preset: Any) -> Any:
    """A preset as it is given, with its kind where that is left out."""
    return {"kind": PLAIN, **preset} if isinstance(preset, dict) and "kind" not in preset else preset


def measured(evaluation: type[Evaluation], given: Given) -> dict[str, Any]:
    """What a job writes: the numbers, and the bytes of what was measured."""
    numbers, files, checkpoint = evaluation.measure(given), given.files, given.checkpoint
    block = files.dense_bytes(files.matrices)
    sizes = {"dense_bytes": block, "stored_bytes": block, "model_stored_bytes": files.manifest["bytes"]}
    if checkpoint:
        sizes = {key: checkpoint.manifest[key] for key in sizes}
    made = {"model_dense_bytes": files.manifest["bytes"], "checkpoint": str((checkpoint or files).directory)}
    return {**numbers, **sizes, **made}
