"""The interface of a recovery: its options, its inputs, and which parameters it may train.

`kinds` is imported when a workflow is planned, so torch is only imported inside functions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from winnow.errors import InputError
from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from winnow.io.resume import Resume
    from winnow.recovery.weights import Weights


class RecoveryOptions(Options):
    """Options of a step after compression that recovers quality."""

    whole: ClassVar[bool] = False  # whether all parameters of the model are trained, not only those of compressed modules
    after: str | None = Field(None, description="name of another recovery, from whose checkpoint this one starts")

    @property
    def reads_gradients(self) -> bool:
        """Whether it needs the second moments of the gradient of the loss at every output."""
        return False

    @property
    def libraries(self) -> tuple[str, ...]:
        """Libraries, besides those of every recovery, whose version can change the result."""
        return ()


class OnWindows(RecoveryOptions):
    """Options of a recovery that works on whole windows of a text."""

    batch: int


class Trained(OnWindows):
    """Options of a recovery that trains on the calibration windows, except for a held-out share."""

    steps: int = Field(200, ge=1, description="steps of Adam; trained tokens: steps x batch x length of the calibration")
    batch: int = Field(8, ge=1, description="windows per step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps for linear warm-up of the learning rate")
    norms: bool = Field(False, description="also train the other vectors of the layers: norm weights, biases of dense matrices")
    rounded: Literal["fixed", "scales", "codes"] = Field(
        "codes",
        description="what of rounded matrices is trained: nothing; their scales; scales, codes and zero points, as in AutoRound",
    )
    code_rate: float = Field(
        5e-3,
        gt=0,
        description="peak learning rate of codes and zero points, in steps of the grid; decays like `rate`",
    )
    held_out: float = Field(
        0.125, gt=0, lt=1, description="share of the calibration windows that are held out to choose the best state"
    )
    every: int = Field(20, ge=1, description="steps between two evaluations on the held-out windows")
    seed: int = Field(0, ge=0, description="seed of the order of the windows and of LoRA's initialisation")


class TaskRows(NamedTuple):
    """The train rows of a classification task: paths of their table, their facts and the tokenizer; tokens per row."""

    train: str
    facts: str
    tokenizer: Path
    length: int


def in_memory() -> Weights:
    from winnow.recovery.weights import Weights

    return Weights()


@dataclass
class Given:
    """A model to be recovered (in float32, changed in place), the dense model, and the calibration windows (n, length).

    `blocks`: {layer: name of its module}; `modules`: the compressed modules (all matrices if the dense model is recovered);
    `dtypes`: stored dtypes by canonical name; `outputs`: function from a module to the metric of its outputs (m, m), if the
    options need one; `weights`: whether both models are in memory, or read block by block."""

    model: PreTrainedModel
    dense: PreTrainedModel
    windows: Tensor
    blocks: dict[int, str]
    modules: list[str]
    dtypes: dict[str, Any]
    options: Any
    first_token: bool = True
    resume: Resume | None = None
    outputs: Callable[[str], Tensor] | None = None
    rows: TaskRows | None = None  # for `finetune`
    weights: Weights = field(default_factory=in_memory)

    def split(self) -> tuple[Tensor, Tensor]:
        """(training windows, held-out windows); the last ones are held out, as the windows are sampled at random.

        Raises InputError if there are not enough for one step and one evaluation."""
        held = max(1, round(len(self.windows) * self.options.held_out))
        if len(self.windows) - held < self.options.batch:
            raise InputError(
                f"recovery: {len(self.windows)} calibration windows, {held} of them held out, are too few for a batch of "
                f"{self.options.batch}; use more calibration windows or a smaller `batch`"
            )
        return self.windows[:-held], self.windows[-held:]

    def parameters(self, below: str = "") -> dict[str, nn.Parameter]:
        """The trainable parameters below a module (default: of the whole model): those of the compressed modules, and with
        `norms` the other vectors of the blocks. Tied tensors are included once."""
        inside = tuple(f"{name}." for name in self.modules)
        blocks = tuple(f"{name}." for name in self.blocks.values())
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):  # of tied tensors, the stored name
            chosen = self.options.whole or name.startswith(inside)
            vector = getattr(self.options, "norms", False) and name.startswith(blocks) and parameter.dim() == 1
            if name in self.dtypes and name.startswith(below) and (chosen or vector) and parameter.numel():
                found.setdefault(id(parameter), (name, parameter))
        return dict(found.values())


class Recovery(Plugin):
    """A way to recover quality after compression, at the same bytes."""

    Options: ClassVar[type[RecoveryOptions]]
    streams: ClassVar[bool] = False  # whether it can hold one block of each model at a time

    @abstractmethod
    def recover(self, given: Given) -> dict[str, Any]:
        """Change `given.model` in place; returns a report with the initial and final losses."""


RECOVERIES: Registry[Recovery] = Registry("winnow.recovery.kinds", Recovery)


def recovery_of(spec: Mapping[str, Any]) -> Recovery:
    """The recovery described by a resolved preset ({kind, ...}), without the one from which it starts."""
    return RECOVERIES.build({key: value for key, value in spec.items() if key != "after"})
