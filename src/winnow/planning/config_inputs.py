"""The options of what the user brings: models and texts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from winnow.data.text_formats import resolved
from winnow.options import Strict
from winnow.training.options import Tuning

Dtype = Literal["float32", "bfloat16", "float16"]


class Model(Strict):
    """A model in Hugging Face layout, weights in safetensors."""

    source: str = Field(
        description="local directory, or hub id (`org/name`) together with `revision`; or a local GGUF file (or a directory with "
        "one), which is dequantised once"
    )
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="commit of the hub repository; required for a hub id"
    )
    dtype: Dtype = Field(
        "float32", description="dtype of the forward passes (statistics, evaluation); stored tensors keep theirs"
    )
    stored_dtype: Dtype | None = Field(
        None,
        description="dtype in which the weights of a GGUF file are stored once dequantised; by default that of its matrices, or "
        "bfloat16 if they are quantised",
    )
    shards: int = Field(1, ge=1, description="number of jobs that factorise the layers; changes no number")
    window_shards: int = Field(
        1,
        ge=1,
        description="number of jobs that run the calibration windows, for statistics and gradients; each reads the model, and "
        "another job adds up their sums; changes no number beyond rounding",
    )
    load: Literal["whole", "stream"] = Field(
        "whole",
        description="stream: read the weights block by block in statistics, gradients and perplexity, for a model larger than "
        "memory; changes no number beyond rounding",
    )
    factors: Literal["stored", "refitted"] = Field(
        "stored",
        description="refitted: of methods that are fitted to the second moments of inputs, without clusters, only the error of "
        "every size is stored, and its predicted loss; a checkpoint's matrices are fitted again, to the same bits, at the size "
        "chosen for each, which takes time for every budget, and far less disk",
    )
    finetune: Tuning | None = Field(
        None, description="first train it as a classifier on a task; everything else then uses the fine-tuned model (see below)"
    )

    def local(self) -> bool:
        return self.revision is None


class Text(Strict):
    """A text as rows, from local files or a hub data set."""

    files: list[str] = Field([], description="local files, in order; or use `dataset`")
    dataset: str | None = Field(None, description="hub data set id")
    subset: str | None = Field(None, description="configuration of the hub data set")
    split: str | None = Field(None, description="split of the hub data set")
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="commit of the hub data set; required with `dataset`"
    )
    format: Literal["raw", "lines", "jsonl", "parquet"] = Field(
        "raw",
        description="when absent, jsonl or parquet by the file endings; raw: a file is one row; lines: a line is a row with its "
        "newline, blank lines are empty rows (WikiText as on the hub)",
    )
    column: str = Field("text", description="column of jsonl, parquet or hub rows")
    separator: str | None = Field(None, description="splits raw files into rows; it is removed")
    start: int = Field(0, ge=0, description="first row used")
    stop: int | None = Field(None, ge=1, description="row after the last one used; all when absent")
    join: str = Field("\n\n", description="separator with which rows are joined to one text")

    @model_validator(mode="before")
    @classmethod
    def _with_format(cls, content: Any) -> Any:
        return resolved(content)

    @model_validator(mode="after")
    def _one_source(self) -> Text:
        if bool(self.files) == bool(self.dataset):
            raise ValueError("give either `files` or `dataset`")
        if self.dataset and not (self.revision and self.split):
            raise ValueError("a hub data set needs `split` and a pinned `revision` (40 hexadecimal digits)")
        return self
