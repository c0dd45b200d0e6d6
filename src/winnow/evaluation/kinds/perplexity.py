from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.data.tokens import PROTOCOLS
from winnow.evaluation.base import Evaluation, EvaluationOptions
from winnow.numerics.logits import ON_CPU
from winnow.options import Name

COPIES = 6  # of logits in float64, that the loss holds at a time
STREAMED = 1 << 21  # numbers of logits at a time, where the model is streamed

if TYPE_CHECKING:
    from winnow.evaluation.base import Given, Running
    from winnow.evaluation.results import Losses
    from winnow.io import specs


class Perplexity(Evaluation):
    """Loss on a text, by a named protocol."""

    reference = "as in the papers of the methods; see the protocols for differences"

    reads = ("tokens",)
    streams = True
    batch = {"batch_tokens": 4096}
    memory_mb = (16000, 24000)  # the second with a checkpoint: two models

    class Options(EvaluationOptions):
        kind: Literal["perplexity"] = Field("perplexity", description="may be omitted: the default kind")
        text: Name = Field(description="name of a text")
        protocol: Literal["p1", "p1_bos", "p2", "plain"] = Field(
            "p1", description="see the table of protocols in config/README.md"
        )
        length: int = Field(2048, ge=2, description="tokens per window")
        stride: int | None = Field(None, ge=1, description="p2 only: new tokens per window")
        windows: int | None = Field(None, ge=2, description="number of windows to use, from the first; all when absent")
        compare: bool = Field(True, description="also run the dense model: KL divergence and top-1 agreement")

        @model_validator(mode="after")
        def _stride_for_p2(self) -> Perplexity.Options:
            if (self.protocol == "p2") != (self.stride is not None):
                raise ValueError("`stride` is required by protocol p2, and only allowed there")
            if self.stride is not None and self.stride >= self.length:
                raise ValueError("`stride` must be smaller than `length`")
            return self

    def spec(self) -> dict[str, Any]:
        rule = PROTOCOLS[self.options.protocol]
        spec = self.options.model_dump(include={"protocol", "length", "stride", "compare"})
        return {**spec, "protocol_version": rule.version, "rule": rule.rule}

    def work(self, running: Running) -> tuple[float, float, float]:
        """`compare` runs two models; streamed, the weights of one block at a time, and what the blocks give is on disk."""
        options, shape = self.options, running.shape
        models = 2 if running.recovered and options.compare else 1
        rows = max(options.length, running.batch_tokens) * shape.vocabulary
        scoring = COPIES * 8 * min(ON_CPU, rows)
        memory = models * (running.loaded + rows * running.unit) + scoring + running.activations
        count, temporary = options.windows or 100, 0.0
        scored = count * options.length
        if running.streamed:
            batch = min(count, max(1, running.batch_tokens // options.length)) * options.length
            embeddings = shape.vocabulary * shape.width
            per_token = running.activations / running.batch_tokens
            passing = running.unit * (shape.block() + embeddings) + batch * per_token
            logits = min(STREAMED, options.length * shape.vocabulary)
            memory = max(passing, models * (running.unit * embeddings + 2 * running.unit * logits) + scoring)
            temporary = 2.0 * models * scored * shape.width * running.unit
        return memory, temporary, 2.0 * models * scored * shape.numbers

    @classmethod
    def measure(cls, given: Given) -> Losses:
        """Loss per window, sums and means, compared with the dense model's."""
        from winnow.checkpoint.loading import load_model
        from winnow.checkpoint.streaming import NAMES, Streamed
        from winnow.evaluation.perplexity import evaluate, evaluate_by_block, summarize_windows
        from winnow.io.artifacts import read_tensors
        from winnow.io.resume import Resume

        spec: specs.Perplexity = given.spec
        where = (spec["dtype"], given.device)
        directories = [(given.checkpoint or given.files).verify()]
        if given.checkpoint and spec["compare"]:
            directories.append(given.files.verify())
        tokens, facts = read_tensors(given.inputs["tokens"], sealed=True)
        windows = (tokens["ids"], tokens["first"], max(1, given.resources["batch_tokens"] // spec["length"]))
        resume = Resume(given.output, given.provenance)
        if given.resources["stream"]:
            length = tokens["ids"].shape[1]
            streamed = [
                Streamed(path, *where, given.output, length, given.provenance, name)
                for path, name in zip(directories, NAMES, strict=False)
            ]
            rows = evaluate_by_block(streamed[0], streamed[1] if streamed[1:] else None, *windows, resume)
        else:
            models = [load_model(path, *where) for path in directories]
            rows = evaluate(models[0], models[1] if models[1:] else None, *windows, resume)
        return {
            "protocol": {
                "protocol": spec["protocol"],
                "protocol_version": spec["protocol_version"],
                "rule": spec["rule"],
                "length": spec["length"],
                "stride": spec["stride"],
                "dtype": spec["dtype"],
            },
            "text": {"text_digest": facts["text_digest"], "text_tokens": facts["text_tokens"], "bos": facts["bos"]},
            **summarize_windows(rows, given.dense()),
            "per_window": rows,
        }

    @classmethod
    def clear(cls, given: Given) -> None:
        from winnow.checkpoint.streaming import clear_left
        from winnow.io.resume import Resume

        Resume(given.output, given.provenance).clear()
        clear_left(given.output)
