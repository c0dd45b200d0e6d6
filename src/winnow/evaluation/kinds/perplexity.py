from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from winnow.evaluation.base import Evaluation, EvaluationOptions
from winnow.options import Name


class Perplexity(Evaluation):
    """Loss on a text, by a named protocol."""

    reference = "as in the papers of the methods; the protocols say how they differ"

    class Options(EvaluationOptions):
        kind: Literal["perplexity"] = Field("perplexity", description="may be left out: a preset without `kind` is one")
        text: Name = Field(description="name of a text")
        protocol: Literal["p1", "p1_bos", "p2", "plain"] = Field(
            "p1", description="see the table of protocols in config/README.md"
        )
        length: int = Field(2048, ge=2, description="tokens per window")
        stride: int | None = Field(None, ge=1, description="p2 only: new tokens per window")
        windows: int | None = Field(None, ge=2, description="only the first so many windows; all when absent")
        compare: bool = Field(True, description="also run the dense model: KL divergence and top-1 agreement")

        @model_validator(mode="after")
        def _stride_for_p2(self) -> Perplexity.Options:
            if (self.protocol == "p2") != (self.stride is not None):
                raise ValueError("`stride` belongs to protocol p2, which needs it")
            if self.stride is not None and self.stride >= self.length:
                raise ValueError("`stride` must be smaller than `length`")
            return self
