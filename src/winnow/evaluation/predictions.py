"""Predicted classes of a classifier for the test rows of a task."""

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

    from winnow.evaluation.results import PerRow


def outputs_of_classes(model: PreTrainedModel, labels: list[str]) -> list[int]:
    """The output index of the model for each class of a task.

    Matched by name if the model names its outputs and the task its classes, otherwise by number. Raises InputError if the two do
    not match, or if the model is not a classifier.
    """
    config: Any = model.config
    if type(model) not in classes_of(config).get("SEQUENCE_CLASSIFICATION", []):
        raise InputError(
            f"{type(model).__name__} has no classification head; set `finetune` for the model, or use a fine-tuned one"
        )
    names = [config.id2label[i] for i in range(config.num_labels)]
    if len(names) != len(labels):
        raise InputError(
            f"the model has {len(names)} outputs ({', '.join(names)}), but the task has {len(labels)}: {', '.join(labels)}"
        )
    unnamed = [[f"LABEL_{i}" for i in range(len(names))], [str(i) for i in range(len(names))]]
    if names in unnamed or labels in unnamed:
        return list(range(len(names)))
    if set(names) != set(labels):
        raise InputError(
            f"the model's outputs are named {', '.join(names)}, but the task's classes {', '.join(labels)}; set the task's "
            "`labels` to the model's names, in the order of the task's numbers"
        )
    return [names.index(label) for label in labels]


@torch.no_grad()
def predict_classes(model: PreTrainedModel, examples: Examples, outputs: list[int], batch: int) -> PerRow:
    """{predicted: class of every row, loss: its cross-entropy in nats}. Raises FloatingPointError, with the row, if a logit is
    not finite."""
    pad, types, device = padding_of(model.config), takes_types(model.config), str(model.device)
    order = sorted(range(len(examples.ids)), key=lambda row: len(examples.ids[row]))  # by length, for little padding
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
