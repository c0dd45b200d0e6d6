"""Options of supervised training on a classification task, before compression (`finetune` of a model) or after it (the recovery
`finetune`)."""

from __future__ import annotations

import math

from pydantic import Field

from winnow.options import Name, Strict


class Tuning(Strict):
    """AdamW in float32 on the train rows of a task, with the dropout of the model's config, linear warm-up and linear decay to 0.
    All weights are trained, including the classification head."""

    task: Name = Field(description="name of an evaluation of kind classification; its train rows are used")
    epochs: float = Field(3.0, gt=0, description="epochs over the train rows, each in a different order")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of `epochs`")
    batch: int = Field(32, ge=1, description="rows per step")
    rate: float = Field(3e-5, gt=0, description="peak learning rate")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps for linear warm-up of the learning rate")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of matrices; vectors (biases, norms) have none")
    clip: float = Field(1.0, gt=0, description="gradient clipping: largest norm of the gradient of all weights")
    seed: int = Field(0, ge=0, description="seed of a new head, the order of the rows, and dropout")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps on this number of rows."""
        return self.steps or math.ceil(self.epochs * rows / self.batch)

    def rate_at(self, step: int, total: int) -> float:
        """The learning rate of a step (from 0) of `total`."""
        warm = self.warmup * total
        return self.rate * min((step + 1) / warm if warm > 0 else 1.0, (total - step) / max(total - warm, 1.0), 1.0)
