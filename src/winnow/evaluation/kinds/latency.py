from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from winnow.evaluation.base import Evaluation, EvaluationOptions

Positive = Annotated[int, Field(ge=1)]
READ = 1 << 28  # bytes read to measure the bandwidth: more than caches hold

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

    def work(self, running: Running) -> tuple[float, float, float]:
        shape = running.shape
        widest = max(max(m.shape) for m in shape.matrices)
        held = max(self.options.batches) * max(self.options.prompts) * (8 * shape.width + 4 * widest + 4 * shape.vocabulary)
        return 2 * running.loaded + held * running.unit + READ, 1e5, 0.0

    @classmethod
    def measure(cls, given: Given) -> Mapping[str, Any]:
        """Times (in turns with the dense model), memory, FLOPs and bytes read."""
        from winnow.checkpoint.loading import load_model
        from winnow.evaluation.latency import evaluate_latency
        from winnow.numerics.inference import for_inference

        spec: specs.Latency = given.spec
        dense = load_model(given.files.verify(), spec["dtype"], given.device)
        model = for_inference(given.model()) if given.checkpoint else None
        protocol = {key: spec[key] for key in ("batches", "prompts", "decode", "repeats", "warm_up", "dtype")}
        return {"protocol": protocol, **evaluate_latency(dense, model, spec, given.device)}
