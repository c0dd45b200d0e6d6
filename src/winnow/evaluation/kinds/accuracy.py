from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from winnow.evaluation.base import FORMATS, Evaluation, EvaluationOptions

if TYPE_CHECKING:
    from winnow.evaluation.base import Given, Running
    from winnow.evaluation.results import TaskScores
    from winnow.io import specs


class Accuracy(Evaluation):
    """Tasks of lm-eval (EleutherAI's harness), paired by document with the dense model."""

    reference = "lm-eval, EleutherAI's evaluation harness"

    libraries = ("datasets", "lm-eval", "accelerate")
    reads = ("tasks", "files")
    batch = {"batch_requests": 8}
    minutes = 240
    table = "winnow.evaluation.accuracy_table:accuracy_table"

    class Options(EvaluationOptions):
        kind: Literal["accuracy"] = Field(description="accuracy")
        tasks: list[str] = Field(
            min_length=1, description="names of tasks or groups of lm-eval or of `include_path`, or paths of definitions (yaml)"
        )
        include_path: str | None = Field(None, description="folder of your own task definitions, with all that they need")
        files: dict[str, dict[str, list[str]]] = Field(
            {},
            description="{task: {split: [files]}}: json, jsonl, parquet or csv instead of the task's hub data set, with the same "
            "columns (`hellaswag` also accepts one `ctx` instead of `ctx_a` and `ctx_b`)",
        )
        num_fewshot: int | None = Field(
            None, ge=0, description="number of few-shot examples in the prompt; the task's own when absent"
        )
        limit: int | None = Field(
            None, ge=2, description="number of documents to use of every task, from the first; all when absent"
        )

        @model_validator(mode="after")
        def _files_of_tasks(self) -> Accuracy.Options:
            for task, splits in self.files.items():
                if task not in self.tasks:
                    raise ValueError(f"`files` has {task!r}, which is not in `tasks`; list the tasks of a group one by one")
                for file in (file for files in splits.values() for file in files):
                    if not file.endswith(FORMATS):
                        raise ValueError(f"`files`: {file}: the name must end in one of {', '.join(FORMATS)}")
            return self

    def work(self, running: Running) -> tuple[float, float, float]:
        memory, temporary, operations = super().work(running)
        return memory + 3 * 4 * running.batch_tokens * running.shape.vocabulary, temporary, operations

    @classmethod
    def measure(cls, given: Given) -> TaskScores:
        """Scores on tasks, per document, compared with the dense model's."""
        from winnow.data.tasks import check_documents, load_tasks, stay_offline
        from winnow.data.tokens import load_tokenizer
        from winnow.evaluation.accuracy import against, score
        from winnow.io.artifacts import read_json

        stay_offline()
        spec: specs.Accuracy = given.spec
        facts = read_json(given.inputs["tasks"])["tasks"]
        tasks = load_tasks(spec)
        check_documents(tasks, facts, spec["limit"])
        tokenizer, batch = load_tokenizer(given.files.verify()), given.resources["batch_requests"]
        scores = score(given.model(), tokenizer, tasks, spec["num_fewshot"], spec["limit"], batch)
        if dense := given.dense():
            scores = against(scores, dense["scores"])
        return {"protocol": {key: spec[key] for key in ("num_fewshot", "limit", "dtype")}, "tasks": facts, "scores": scores}
