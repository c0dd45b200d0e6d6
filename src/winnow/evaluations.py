"""What can be measured of a model: the kinds of presets in the section `evaluations`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from winnow.fields import Name, Strict

Positive = Annotated[int, Field(ge=1)]
FORMATS = (".json", ".jsonl", ".parquet", ".csv")  # of local data of a task
PLAIN = "perplexity"  # the kind of a preset that names none


class Perplexity(Strict):
    """Loss on a text, by a named protocol."""

    kind: Literal["perplexity"] = Field("perplexity", description="may be left out: a preset without `kind` is one")
    text: Name = Field(description="name of a text")
    protocol: Literal["p1", "p1_bos", "p2", "plain"] = Field("p1", description="see the table of protocols in config/README.md")
    length: int = Field(2048, ge=2, description="tokens per window")
    stride: int | None = Field(None, ge=1, description="p2 only: new tokens per window")
    windows: int | None = Field(None, ge=2, description="only the first so many windows; all when absent")
    compare: bool = Field(True, description="also run the dense model: KL divergence and top-1 agreement")

    @model_validator(mode="after")
    def _stride_for_p2(self) -> Perplexity:
        if (self.protocol == "p2") != (self.stride is not None):
            raise ValueError("`stride` belongs to protocol p2, which needs it")
        if self.stride is not None and self.stride >= self.length:
            raise ValueError("`stride` must be smaller than `length`")
        return self


class Accuracy(Strict):
    """Tasks of lm-eval (EleutherAI's harness), paired by document with the dense model."""

    kind: Literal["accuracy"] = Field(description="accuracy")
    tasks: list[str] = Field(
        min_length=1, description="names of tasks or groups of lm-eval or of `include_path`, or paths of definitions (yaml)"
    )
    include_path: str | None = Field(None, description="folder of task definitions of your own, with all that they need")
    files: dict[str, dict[str, list[str]]] = Field(
        {},
        description="{task: {split: [files]}}: json, jsonl, parquet or csv read instead of the task's hub data set, of the same "
        "columns (`hellaswag` also takes rows with one `ctx` for `ctx_a` and `ctx_b`)",
    )
    num_fewshot: int | None = Field(None, ge=0, description="worked examples in the prompt; the task's own number when absent")
    limit: int | None = Field(None, ge=2, description="only the first so many documents of every task; all when absent")

    @model_validator(mode="after")
    def _files_of_tasks(self) -> Accuracy:
        for task, splits in self.files.items():
            if task not in self.tasks:
                raise ValueError(f"`files` has {task!r}, which is not in `tasks`; name the tasks of a group one by one")
            for file in (file for files in splits.values() for file in files):
                if not file.endswith(FORMATS):
                    raise ValueError(f"`files`: {file}: the name must end in one of {', '.join(FORMATS)}")
        return self


class Latency(Strict):
    """Time of prefill and of decoding, memory and reads, beside the dense model in the same process and dtype."""

    kind: Literal["latency"] = Field(description="latency")
    batches: list[Positive] = Field([1, 8, 32], min_length=1, description="sequences at a time")
    prompts: list[Positive] = Field([128], min_length=1, description="tokens per sequence that prefill reads")
    decode: Positive = Field(32, description="tokens per sequence that are decoded after the prompt, one at a time")
    repeats: int = Field(15, ge=6, description="timed runs of each model, in turns; ratios are taken within a repeat")
    warm_up: int = Field(2, ge=1, description="prompts that each model reads before, not timed")


class Classification(Strict):
    """Sequence classification, of one text or of a pair (GLUE's tasks but STS-B): a model with a classification head is scored
    on `test`; what tunes or calibrates on the task reads `train` only, and the two never share a row."""

    kind: Literal["classification"] = Field(description="classification")
    train: list[str] = Field([], description="local files (json, jsonl, csv, parquet); or use `dataset`")
    test: list[str] = Field([], description="local files of the rows that are scored")
    dataset: str | None = Field(None, description="hub data set id")
    subset: str | None = Field(None, description="configuration of the hub data set")
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="commit of the hub data set; required with `dataset`"
    )
    train_split: str = Field("train", description="split of the hub data set")
    test_split: str = Field("validation", description="split that is scored; GLUE's own `test` has no labels")
    columns: list[str] = Field(min_length=1, max_length=2, description="column of the text, or the two of a pair in their order")
    label: str = Field("label", description="column of the class: its number or its name")
    labels: list[str] | None = Field(
        None,
        min_length=2,
        description="names of the classes in the order of their numbers; when absent those of the hub data set, or the sorted "
        "names that stand in the files",
    )
    length: int = Field(128, ge=4, description="tokens per example at most, special ones included; longer texts are cut")
    limit: int | None = Field(None, ge=2, description="only the first so many rows of `test`; all when absent")
    shared_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="train rows whose texts stand in `test` too: stop, or leave them out of training"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Classification:
        if bool(self.dataset) == bool(self.train or self.test) or bool(self.train) != bool(self.test):
            raise ValueError("give either `train` and `test`, or `dataset`")
        if self.dataset and not self.revision:
            raise ValueError("a hub data set needs a pinned `revision` (40 hexadecimal digits)")
        for file in [*self.train, *self.test]:
            if not file.endswith(FORMATS):
                raise ValueError(f"{file}: the name must end in one of {', '.join(FORMATS)}")
        for name, given in (("columns", self.columns), ("labels", self.labels or [])):
            if len(set(given)) < len(given):
                raise ValueError(f"`{name}` holds a name twice")
        if set(self.train) & set(self.test):
            raise ValueError(f"{sorted(set(self.train) & set(self.test))[0]}: stands in both `train` and `test`")
        return self

    def rows(self) -> dict[str, Any]:
        """What says which rows there are, and of which class; the rest is how they are scored."""
        return self.model_dump(exclude={"kind", "length", "limit"})

    def training(self) -> dict[str, Any]:
        """What says which rows are trained on."""
        return {key: value for key, value in self.rows().items() if key not in ("test", "test_split", "shared_rows")}


def _with_kind(preset: Any) -> Any:
    return {"kind": PLAIN, **preset} if isinstance(preset, dict) and "kind" not in preset else preset


AnyEvaluation = Annotated[
    Perplexity | Accuracy | Latency | Classification, Field(discriminator="kind"), BeforeValidator(_with_kind)
]
EVALUATIONS: dict[str, type[Strict]] = {
    "perplexity": Perplexity,
    "accuracy": Accuracy,
    "latency": Latency,
    "classification": Classification,
}
