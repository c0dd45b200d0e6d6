"""The interface of an evaluation: what is measured of a model, dense or compressed.

`kinds` is imported when a workflow is planned, so torch is only imported inside functions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.io.records import Provenance, sizes_of
from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.models.shape import Shape

FORMATS = (".json", ".jsonl", ".parquet", ".csv")  # of local task data
PLAIN = "perplexity"  # the kind of a preset without `kind`


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
    """The inputs of a job: the dense model, and optionally a `checkpoint` compared with it."""

    spec: Any  # `Evaluation.spec`, the preset's `name` and `kind`, the model's `dtype`, the checkpoint's `recovery`
    files: ModelFiles
    checkpoint: Bundle | None
    inputs: Mapping[str, Any]  # paths of what it `reads`; of the dense model the result, `dense`, and the hidden `states`
    resources: Mapping[str, int]  # batch sizes (`Evaluation.batch`), and `stream`
    device: str
    provenance: Provenance
    output: str  # the path of the result; unfinished work is saved beside it
    keep_at: str | None = None  # where the dense model's job must write its hidden states, see `Evaluation.keeps`

    def model(self) -> PreTrainedModel:
        """The model to measure; its files are first checked against their digests."""
        from winnow.checkpoint.loading import load_model

        return load_model((self.checkpoint or self.files).verify(), self.spec["dtype"], self.device)

    def dense(self) -> Any:
        """The dense model's result; None if the dense model is measured."""
        from winnow.io.artifacts import read_json

        return read_json(self.inputs["dense"]) if self.checkpoint else None


class Evaluation(Plugin):
    """A measurement of a model. `measure` runs as a job for every cell; every kind has a rule."""

    libraries: ClassVar[tuple[str, ...]] = ()  # besides those that run a model; their versions can change a result
    # Inputs besides the model: `tokens` of its text, `tasks` and `files` of lm-eval, `test` rows and their `facts`.
    reads: ClassVar[tuple[str, ...]] = ()
    paired: ClassVar[bool] = True  # whether it reads the dense model's result
    recovered: ClassVar[bool] = True  # whether the dense model after a recovery is measured as well
    alone: ClassVar[bool] = False  # whether no other job may run at the same time
    streams: ClassVar[bool] = False  # whether it can run the model block by block
    # `module:function` of (rows, results) that makes the table of all cells of the kind. Use a separate module: then editing the
    # table does not repeat measurements.
    table: ClassVar[str | None] = None
    # Whether the job of the dense model also writes its hidden states, which jobs of compressed models read as the input
    # `states`. `measure` must then write the file `Given.keep_at` if there is one, even if there is nothing to keep
    # (`winnow.io.hidden_states.write_hidden`).
    keeps: ClassVar[bool] = False
    batch: ClassVar[dict[str, int]] = {}  # size of a forward pass; only changes rounding
    # For a job of the dense model and of a compressed model, if it is not forecast.
    memory_mb: ClassVar[tuple[int, int]] = (16000, 16000)
    minutes: ClassVar[int] = 60
    Options: ClassVar[type[EvaluationOptions]]

    def spec(self) -> Mapping[str, Any]:
        """The options on which a result depends, as builtin types."""
        return self.options.model_dump(exclude={"kind"})

    def work(self, running: Running) -> tuple[float, float, float]:
        """(bytes of memory, bytes of files that are removed at the end, floating-point operations) of a job, for forecasts; by
        default those of holding the model and a batch of activations."""
        return running.loaded + running.activations, 0.0, 0.0

    def kept(self, running: Running) -> float:
        """Bytes of hidden states that a job of the dense model keeps."""
        return 0.0

    @classmethod
    @abstractmethod
    def measure(cls, given: Given) -> Mapping[str, Any]:
        """The numbers of a model. Sizes and the name of the checkpoint are added by the caller."""

    @classmethod
    def clear(cls, given: Given) -> None:
        """Remove unfinished work after the result is written."""


EVALUATIONS: Registry[Evaluation] = Registry("winnow.evaluation.kinds", Evaluation)


def with_kind(preset: Any) -> Any:
    """A preset with the default kind added if it has none."""
    return {"kind": PLAIN, **preset} if isinstance(preset, dict) and "kind" not in preset else preset


def measured(evaluation: type[Evaluation], given: Given) -> dict[str, Any]:
    """The result of a job: the numbers, and the bytes of the measured model."""
    numbers, files, checkpoint = evaluation.measure(given), given.files, given.checkpoint
    sizes = sizes_of(checkpoint.manifest) if checkpoint else files.sizes()
    made = {"model_dense_bytes": files.manifest["bytes"], "checkpoint": str((checkpoint or files).directory)}
    return {**numbers, **sizes, **made}
