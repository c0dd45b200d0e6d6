from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from winnow.evaluation.base import Evaluation, EvaluationOptions

Positive = Annotated[int, Field(ge=1)]


class Latency(Evaluation):
    """Time of prefill and of decoding, memory and reads, beside the dense model in the same process and dtype."""

    reference = "times in turns with the dense model"

    class Options(EvaluationOptions):
        kind: Literal["latency"] = Field(description="latency")
        batches: list[Positive] = Field([1, 8, 32], min_length=1, description="sequences at a time")
        prompts: list[Positive] = Field([128], min_length=1, description="tokens per sequence that prefill reads")
        decode: Positive = Field(32, description="tokens per sequence that are decoded after the prompt, one at a time")
        repeats: int = Field(15, ge=6, description="timed runs of each model, in turns; ratios are taken within a repeat")
        warm_up: int = Field(2, ge=1, description="prompts that each model reads before, not timed")
