from __future__ import annotations

from pathlib import Path
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
    keeps = True
    batch = {"batch_tokens": 4096}
    memory_mb = (16000, 24000)  # the second with a checkpoint, and the dense model's head

    class Options(EvaluationOptions):
        kind: Literal["perplexity"] = Field("perplexity", description="may be omitted: the default kind")
        text: Name = Field(description="name of a text")
        protocol: Literal["p1", "p1_bos", "p2", "plain"] = Field(
            "p1", description="see the table of protocols in config/README.md"
        )
        length: int = Field(2048, ge=2, description="tokens per window")
        stride: int | None = Field(None, ge=1, description="p2 only: new tokens per window")
        windows: int | None = Field(None, ge=2, description="number of windows to use, from the first; all when absent")
        compare: bool = Field(True, description="compare predictions with the dense model's, too: KL divergence, top-1 agreement")

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
        """With `compare` a compressed model, and the head of the dense one; streamed, the weights of one block at a time, and
        what the blocks give is on disk, twice at a time. The dense model's job keeps it; the file it comes from is temporary."""
        options, shape = self.options, running.shape
        models = 2 if running.recovered and options.compare else 1
        rows = max(options.length, running.batch_tokens) * shape.vocabulary
        head = (models - 1) * shape.vocabulary * shape.width
        scoring = COPIES * 8 * min(ON_CPU, rows)
        memory = running.loaded + running.unit * (head + models * rows) + scoring + running.activations
        scored = self.scored
        temporary = self.kept(running)
        if running.streamed:
            batch = min(self.options.windows or 100, max(1, running.batch_tokens // options.length)) * options.length
            embeddings = shape.vocabulary * shape.width
            per_token = running.activations / running.batch_tokens
            passing = running.unit * (shape.block() + embeddings) + batch * per_token
            logits = min(STREAMED, options.length * shape.vocabulary)
            memory = max(passing, models * (running.unit * embeddings + 2 * running.unit * logits) + scoring)
            temporary = 2.0 * scored * shape.width * running.unit - temporary
        return memory, temporary, 2.0 * scored * (shape.numbers + head)

    @property
    def scored(self) -> int:
        """Tokens of all windows."""
        return (self.options.windows or 100) * self.options.length

    def kept(self, running: Running) -> float:
        of_dense = self.options.compare and not running.recovered
        return float(self.scored * running.shape.width * running.unit) if of_dense else 0.0

    @classmethod
    def measure(cls, given: Given) -> Losses:
        """Loss per window, sums and means, compared with the dense model's."""
        from winnow.checkpoint.streaming import Streamed
        from winnow.evaluation.hidden import OTHERS, Compared, Keeper
        from winnow.evaluation.perplexity import evaluate, evaluate_by_block, summarize_windows
        from winnow.io.artifacts import read_tensors
        from winnow.io.hidden_states import write_hidden
        from winnow.io.resume import Resume

        spec: specs.Perplexity = given.spec
        where, by_block = (spec["dtype"], given.device), bool(given.resources["stream"])
        tokens, facts = read_tensors(given.inputs["tokens"], sealed=True)
        windows = (tokens["ids"], tokens["first"], max(1, given.resources["batch_tokens"] // spec["length"]))
        count, length = tokens["ids"].shape
        resume = Resume(given.output, given.provenance)
        dense: Any = None
        if given.checkpoint and spec["compare"]:
            dense = Compared(given.files, given.inputs["states"], *where, given.output, frugal=by_block)
        states: Any = None  # after the last block, if they are to be kept
        if by_block:
            directory = (given.checkpoint or given.files).verify()
            states = Streamed(directory, *where, given.output, length, given.provenance)
            rows = evaluate_by_block(states, dense and dense.streamed, *windows, resume)
        else:
            model = given.model()
            if given.keep_at and spec["compare"]:
                states = Keeper(model, given.output, count, length)
            rows = evaluate(model, dense, *windows, resume, states)
        if given.keep_at:
            kept = states if spec["compare"] else None
            metadata = {"provenance": {**given.provenance, "file": Path(given.keep_at).name}}
            metadata |= {OTHERS: kept.others} if kept else {}
            write_hidden(given.keep_at, kept and kept.stored, count, metadata)
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
