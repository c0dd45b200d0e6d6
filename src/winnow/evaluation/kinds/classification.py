from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.data.text_formats import ROWS, rows_of
from winnow.evaluation.base import FORMATS, Evaluation, EvaluationOptions

if TYPE_CHECKING:
    from winnow.evaluation.base import Given, Running
    from winnow.evaluation.results import ClassScores
    from winnow.io import specs
    from winnow.io.records import ExamplesFacts


class Classification(Evaluation):
    """Sequence classification of single texts or pairs (the GLUE tasks except STS-B): a model with a classification head is
    scored on `test`; fine-tuning and calibration on the task only use `train`, and the two never share a row."""

    reference = "GLUE, arXiv 1804.07461"

    libraries = ("pandas", "pyarrow")
    reads = ("test", "facts")
    batch = {"batch_rows": 32}
    minutes = 120
    table = "winnow.evaluation.classification_table:classification_table"

    class Options(EvaluationOptions):
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
        columns: list[str] = Field(
            min_length=1, max_length=2, description="column of the text, or the two of a pair in their order"
        )
        label: str = Field("label", description="column of the class: its number or its name")
        labels: list[str] | None = Field(
            None,
            min_length=2,
            description="names of the classes in the order of their numbers; when absent those of the hub data set, or the "
            "sorted names in the files",
        )
        length: int = Field(
            128, ge=4, description="maximum tokens per example, including special tokens; longer texts are truncated"
        )
        limit: int | None = Field(None, ge=2, description="number of `test` rows to use, from the first; all when absent")
        shared_rows: Literal["refuse", "drop"] = Field(
            "refuse", description="train rows whose texts are also in `test`: stop with an error, or leave them out of training"
        )

        @model_validator(mode="after")
        def _one_source(self) -> Classification.Options:
            if bool(self.dataset) == bool(self.train or self.test) or bool(self.train) != bool(self.test):
                raise ValueError("give either `train` and `test`, or `dataset`")
            if self.dataset and not self.revision:
                raise ValueError("a hub data set needs a pinned `revision` (40 hexadecimal digits)")
            for file in [*self.train, *self.test]:
                if not file.endswith(FORMATS):
                    raise ValueError(f"{file}: the name must end in one of {', '.join(FORMATS)}")
            for name, given in (("columns", self.columns), ("labels", self.labels or [])):
                if len(set(given)) < len(given):
                    raise ValueError(f"`{name}` has duplicates")
            if set(self.train) & set(self.test):
                raise ValueError(f"{sorted(set(self.train) & set(self.test))[0]}: in both `train` and `test`")
            return self

        def rows(self) -> specs.Examples:
            """The options that determine the rows and their classes; the others determine the scoring."""
            return self.model_dump(exclude={"kind", "length", "limit"})  # type: ignore[return-value]

        def training(self) -> dict[str, Any]:
            """The options that determine the training rows."""
            return {key: value for key, value in self.rows().items() if key not in ("test", "test_split", "shared_rows")}

    def spec(self) -> dict[str, Any]:
        return self.options.model_dump(include={"length", "limit"})

    def work(self, running: Running) -> tuple[float, float, float]:
        memory, temporary, _ = super().work(running)
        rows = min(self.options.limit or ROWS, rows_of(self.options.test))
        return memory, temporary, 2.0 * rows * self.options.length * running.shape.numbers

    @classmethod
    def measure(cls, given: Given) -> ClassScores:
        """Predicted classes of the test rows, and scores compared with the dense model's."""
        from winnow.data.examples import encode_rows
        from winnow.data.tokens import check_length, load_tokenizer
        from winnow.evaluation.classification import scores
        from winnow.evaluation.predictions import outputs_of_classes, predict_classes
        from winnow.io.artifacts import read_json, read_parquet

        spec: specs.Classification = given.spec
        facts: ExamplesFacts = read_json(given.inputs["facts"])
        check_length(spec["length"], given.files.manifest["max_length"])
        tokenizer, model = load_tokenizer(given.files.verify()), given.model()
        outputs = outputs_of_classes(model, facts["labels"])
        examples = encode_rows(tokenizer, read_parquet(given.inputs["test"])[: spec["limit"]], spec["length"])
        own, labels = predict_classes(model, examples, outputs, given.resources["batch_rows"]), examples.labels.tolist()
        dense = given.dense()
        return {
            "protocol": {key: spec[key] for key in ("length", "limit", "dtype")},
            "tasks": {spec["name"]: {"documents": len(labels), **facts}},
            "scores": {spec["name"]: scores(labels, own, len(facts["labels"]), dense["per_row"] if dense else None)},
            "correct": sum(a == b for a, b in zip(labels, own["predicted"], strict=True)),
            "count": len(labels),
            "per_row": {"label": labels, **own},
        }
