"""The interface of an evaluation: what is measured of a model, dense or compressed.

Files of `kinds` are read when a workflow is planned, so they import torch inside functions only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from winnow.registry import Options, Plugin, Registry

FORMATS = (".json", ".jsonl", ".parquet", ".csv")  # of local data of a task
PLAIN = "perplexity"  # the kind of a preset that names none


class EvaluationOptions(Options):
    pass


class Evaluation(Plugin):
    """What is measured of a model."""

    Options: ClassVar[type[EvaluationOptions]]


EVALUATIONS: Registry[Evaluation] = Registry("winnow.evaluation.kinds", Evaluation)


def with_kind(preset: Any) -> Any:
    """A preset as it is given, with its kind where that is left out."""
    return {"kind": PLAIN, **preset} if isinstance(preset, dict) and "kind" not in preset else preset
