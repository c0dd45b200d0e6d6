"""`finetune`: training on the labels of a task after compression; the same for the dense model is the control."""

from __future__ import annotations

from typing import Any

from winnow.data.examples import encode_rows
from winnow.data.tokens import load_tokenizer
from winnow.errors import InputError
from winnow.evaluation.predictions import outputs_of_classes
from winnow.io.artifacts import read_json, read_parquet
from winnow.recovery.base import Given
from winnow.training.finetune import train_classifier


def finetune_again(given: Given) -> dict[str, Any]:
    """Train all weights of `given.model` in place; returns steps, rows and losses (nats). Resumes after the last saved step.

    Raises InputError if the model is not a classifier for the task's classes."""
    if given.rows is None:
        raise InputError("recovery: `finetune` needs the train rows of a task")
    outputs = outputs_of_classes(given.model, read_json(given.rows.facts)["labels"])
    examples = encode_rows(load_tokenizer(given.rows.tokenizer), read_parquet(given.rows.train), given.rows.length)
    for parameter in given.parameters().values():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return train_classifier(given.model, examples, outputs, given.options, given.resume)
