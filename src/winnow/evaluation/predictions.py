"""Which class a classifier gives to the test rows of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from winnow.data.examples import Examples, padding_of, takes_types
from winnow.errors import InputError
from winnow.io.progress import every
from winnow.models.classes import classes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def outputs_of_classes(model: PreTrainedModel, labels: list[str]) -> list[int]:
    """For each class of a task, by number, the output of the model that stands for it.

    By name where the model names its outputs and the task its classes, else by number. Raises InputError if the two do not fit,
    or if the model is no classifier.
    """
    config: Any = model.config
    if type(model) not in classes_of(config).get("SEQUENCE_CLASSIFICATION", []):
        raise InputError(
            f"{type(model).__name__} has no classification head; give the model a `finetune` on a task, or one that was tuned"
        )
    names = [config.id2label[i] for i in range(config.num_labels)]
    if len(names) != len(labels):
        raise InputError(f"the model has {len(names)} outputs ({', '.join(names)}), the task {len(labels)}: {', '.join(labels)}")
    unnamed = [[f"LABEL_{i}" for i in range(len(names))], [str(i) for i in range(len(names))]]
    if names in unnamed or labels in unnamed:
        return list(range(len(names)))
    if set(names) != set(labels):
        raise InputError(
            f"the model's outputs are named {', '.join(names)}, the task's classes {', '.join(labels)}; give the task's "
            "`labels` by the model's names, in the order of the task's numbers"
        )
    return [names.index(label) for label in labels]


@torch.no_grad()
def predict(model: PreTrainedModel, examples: Examples, outputs: list[int], batch: int) -> dict[str, list]:
    """{predicted: class of every row, loss: its cross-entropy in nats}. Raises FloatingPointError, with the row, if a logit is
    not finite."""
    pad, types, device = padding_of(model.config), takes_types(model.config), str(model.device)
    order = sorted(range(len(examples.ids)), key=lambda row: len(examples.ids[row]))  # little padding; told in their own order
    predicted, losses = np.zeros(len(order), dtype=np.int64), np.zeros(len(order))
    for start in every(range(0, len(order), batch), "batches"):
        rows = order[start : start + batch]
        logits = model(**examples.batch(rows, pad, types, device)).logits[:, outputs].double()
        if not torch.isfinite(logits).all():
            bad = rows[int((~torch.isfinite(logits)).any(1).nonzero()[0])]
            raise FloatingPointError(f"logits are not finite for row {bad} of test")
        answers = torch.from_numpy(examples.labels[rows]).to(device)
        predicted[rows] = logits.argmax(1).cpu().numpy()
        losses[rows] = torch.nn.functional.cross_entropy(logits, answers, reduction="none").cpu().numpy()
    return {"predicted": predicted.tolist(), "loss": losses.tolist()}
