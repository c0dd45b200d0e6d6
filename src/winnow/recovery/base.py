"""What every recovery is given, and which numbers it may train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from winnow.errors import InputError
from winnow.resume import Resume

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
