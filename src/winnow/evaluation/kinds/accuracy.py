from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from winnow.evaluation.base import FORMATS, Evaluation, EvaluationOptions


class Accuracy(Evaluation):
    """Tasks of lm-eval (EleutherAI's harness), paired by document with the dense model."""

    reference = "lm-eval, EleutherAI's evaluation harness"

    class Options(EvaluationOptions):
        kind: Literal["accuracy"] = Field(description="accuracy")
        tasks: list[str] = Field(
            min_length=1, description="names of tasks or groups of lm-eval or of `include_path`, or paths of definitions (yaml)"
        )
        include_path: str | None = Field(None, description="folder of task definitions of your own, with all that they need")
        files: dict[str, dict[str, list[str]]] = Field(
            {},
            description="{task: {split: [files]}}: json, jsonl, parquet or csv read instead of the task's hub data set, of the "
            "same columns (`hellaswag` also takes rows with one `ctx` for `ctx_a` and `ctx_b`)",
        )
        num_fewshot: int | None = Field(
            None, ge=0, description="worked examples in the prompt; the task's own number when absent"
        )
        limit: int | None = Field(None, ge=2, description="only the first so many documents of every task; all when absent")

        @model_validator(mode="after")
        def _files_of_tasks(self) -> Accuracy.Options:
            for task, splits in self.files.items():
                if task not in self.tasks:
                    raise ValueError(f"`files` has {task!r}, which is not in `tasks`; name the tasks of a group one by one")
                for file in (file for files in splits.values() for file in files):
                    if not file.endswith(FORMATS):
                        raise ValueError(f"`files`: {file}: the name must end in one of {', '.join(FORMATS)}")
            return self
