"""Options of supervised training on a classification task: before compression (`finetune` of a model), and again after it (the
recovery `finetune`)."""

from __future__ import annotations

import math

from pydantic import Field

from winnow.options import Name, Strict


class Tuning(Strict):
    """AdamW in float32 on the train rows of a task, dropout as in the model's config; the rate grows linearly over the warm-up
    and falls linearly to 0. All weights are trained, those of the classification head too."""

    task: Name = Field(description="name of an evaluation of kind classification, whose train rows are learned")
    epochs: float = Field(3.0, gt=0, description="passes over the train rows; each has an order of its own")
    steps: int | None = Field(None, ge=1, description="optimiser steps in the place of `epochs`")
    batch: int = Field(32, ge=1, description="rows per step")
    rate: float = Field(3e-5, gt=0, description="learning rate at its height")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps over which the rate grows")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; vectors (biases, norms) have none")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient of all weights")
    seed: int = Field(0, ge=0, description="of a new head, the order of the rows, and dropout")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps on so many rows."""
        return self.steps or math.ceil(self.epochs * rows / self.batch)

    def rate_at(self, step: int, total: int) -> float:
        """The learning rate of a step (from 0) of `total`."""
        warm = self.warmup * total
        return self.rate * min((step + 1) / warm if warm > 0 else 1.0, (total - step) / max(total - warm, 1.0), 1.0)
