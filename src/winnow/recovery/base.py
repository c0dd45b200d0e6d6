"""The interface of a recovery: its options, what it is given, and which numbers it may train.

Files of `kinds` are read when a workflow is planned, so they import torch inside functions only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from winnow.errors import InputError
from winnow.registry import Options, Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from winnow.io.resume import Resume


class RecoveryOptions(Options):
    """What is done after compression to win back quality."""

    whole: ClassVar[bool] = False  # whether all numbers of the model are trained, not those of its compressed modules only
    after: str | None = Field(None, description="another recovery by its name: this one goes on from the checkpoint that it made")

    @property
    def reads_gradients(self) -> bool:
        """Whether it reads the second moments of the loss's gradient in every output."""
        return False

    @property
    def libraries(self) -> tuple[str, ...]:
        """What it uses beside what every recovery does, and whose version can change what it makes."""
        return ()


class OnWindows(RecoveryOptions):
    """Options of a recovery that works on whole windows of a text."""

    batch: int


class Trained(OnWindows):
    """A recovery that trains on the calibration windows, a share of which is held out and never trained on."""

    steps: int = Field(200, ge=1, description="steps of Adam; tokens trained on are steps x batch x length of the calibration")
    batch: int = Field(8, ge=1, description="windows per step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the rate grows to its full height")
    norms: bool = Field(False, description="also train the layers' other vectors: weights of norms, biases of dense matrices")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the calibration windows that only choose the best state")
    every: int = Field(20, ge=1, description="steps between two looks at the held-out windows")
    seed: int = Field(0, ge=0, description="order of the windows, and start of LoRA")


@dataclass
class Task:
    """A model to be recovered (in float32, changed in place), the dense one beside it, and the calibration windows (n, length).

    `blocks` maps layers to the names of their modules; `modules` are the compressed modules (all matrices of the dense model,
    where that is to be recovered); `dtypes` are those that tensors are stored in, by canonical name; `outputs` gives the metric
    of a module's outputs (m, m), where the options ask for one."""

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
    rows: dict[str, Any] | None = None  # for `finetune`: paths of the `train` rows and their `facts`, `tokenizer`, `length`

    def split(self) -> tuple[Tensor, Tensor]:
        """(windows to train on, windows held out: the last ones). Windows are drawn at random, so any of them will do.

        Raises InputError if there are not enough for one step and one look."""
        held = max(1, round(len(self.windows) * self.options.held_out))
        if len(self.windows) - held < self.options.batch:
            raise InputError(
                f"recovery: {len(self.windows)} calibration windows, {held} of them held out, are too few for a batch of "
                f"{self.options.batch}; calibrate on more windows or make the batch smaller"
            )
        return self.windows[:-held], self.windows[-held:]

    def parameters(self, below: str = "") -> dict[str, nn.Parameter]:
        """What may be trained below a module (by default of the whole model): the numbers of the compressed modules, and with
        `norms` the other vectors of the blocks. Tied tensors are there once."""
        inside = tuple(f"{name}." for name in self.modules)
        blocks = tuple(f"{name}." for name in self.blocks.values())
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):  # of tied ones, the name that is stored
            chosen = self.options.whole or name.startswith(inside)
            vector = getattr(self.options, "norms", False) and name.startswith(blocks) and parameter.dim() == 1
            if name in self.dtypes and name.startswith(below) and (chosen or vector):
                found.setdefault(id(parameter), (name, parameter))
        return dict(found.values())


class Recovery(Plugin):
    """A way to win back quality after compression, at the same bytes."""

    Options: ClassVar[type[RecoveryOptions]]

    @abstractmethod
    def recover(self, task: Task) -> dict[str, Any]:
        """Change the model of the task in place; returns a report, with the losses of the start and of the end."""


RECOVERIES: Registry[Recovery] = Registry("winnow.recovery.kinds", Recovery)


def recovery_of(spec: Mapping[str, Any]) -> Recovery:
    """The recovery that a resolved preset ({kind, ...}) describes; without the one that it goes on from."""
    return RECOVERIES.build({key: value for key, value in spec.items() if key != "after"})
