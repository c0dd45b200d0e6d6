from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from winnow.evaluation.base import Evaluation, EvaluationOptions
from winnow.evaluation.machine import ENGINE, READ

Positive = Annotated[int, Field(ge=1)]

if TYPE_CHECKING:
    from winnow.evaluation.base import Given, Running
    from winnow.io import specs


class Latency(Evaluation):
    """Time of prefill and decoding, memory, and bytes read, compared with the dense model in the same process and dtype. The
    compressed model is prepared by `winnow.for_inference`."""

    reference = "timed in turns with the dense model"

    paired = False  # it runs the dense model itself
    recovered = False  # a recovered dense model is as fast as the dense model
    alone = True
    memory_mb = (16000, 24000)  # the second with a checkpoint: two models
    table = "winnow.evaluation.latency_table:latency_table"

    class Options(EvaluationOptions):
        kind: Literal["latency"] = Field(description="latency")
        batches: list[Positive] = Field([1, 8, 32], min_length=1, description="batch sizes (sequences)")
        prompts: list[Positive] = Field([128], min_length=1, description="prompt lengths (tokens per sequence)")
        decode: Positive = Field(32, description="tokens per sequence decoded after the prompt, one at a time")
        repeats: int = Field(15, ge=6, description="timed runs of each model, in turns; ratios are computed within a repeat")
        warm_up: int = Field(2, ge=1, description="untimed prompts for each model before the timed runs")
        engine: Literal["transformers", "llama.cpp", "vllm"] = Field(
            "transformers",
            description="what runs the models; llama.cpp and vllm on CPUs, in an environment of their own, one process for each "
            "model: the checkpoint as `winnow export --format gguf` writes it, or as it is stored",
        )
        python: str | None = Field(
            None, description="the interpreter of an environment with llama-cpp-python, or with vllm and winnow"
        )

        @model_validator(mode="after")
        def _runs(self) -> Latency.Options:
            if (self.engine == ENGINE) != (self.python is None):
                raise ValueError(
                    f"engine {self.engine}: "
                    + ("remove python" if self.python else "python, the path of an interpreter, is missing")
                )
            if self.engine == "llama.cpp" and self.batches != [1]:
                raise ValueError("engine llama.cpp: it decodes one sequence; set batches: [1]")
            return self

    def work(self, running: Running) -> tuple[float, float, float]:
        shape = running.shape
        widest = max(max(m.shape) for m in shape.matrices)
        held = max(self.options.batches) * max(self.options.prompts) * (8 * shape.width + 4 * widest + 4 * shape.vocabulary)
        return 2 * running.loaded + held * running.unit + READ, 0.0, 0.0

    @classmethod
    def measure(cls, given: Given) -> Mapping[str, Any]:
        """Times (in turns with the dense model), memory, FLOPs and bytes read."""
        from winnow.checkpoint.loading import load_model
        from winnow.evaluation.latency import evaluate_latency
        from winnow.numerics.inference import for_inference

        spec: specs.Latency = given.spec
        keys = ("batches", "prompts", "decode", "repeats", "warm_up", "dtype", "engine")
        protocol = {key: spec[key] for key in keys}  # type: ignore[literal-required]
        if spec["engine"] != ENGINE:
            from winnow.evaluation.engine_latency import engine_latency
            from winnow.models.classes import read_config

            dense_files, folder = given.files.verify(), Path(given.output).parent
            checkpoint = given.checkpoint.verify() if given.checkpoint else None
            vocabulary = read_config(dense_files).get_text_config().vocab_size
            return {"protocol": protocol, **engine_latency(dense_files, checkpoint, spec, vocabulary, folder)}
        dense = load_model(given.files.verify(), spec["dtype"], given.device)
        model = for_inference(given.model()) if given.checkpoint else None
        return {"protocol": protocol, **evaluate_latency(dense, model, spec, given.device)}
