from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.recovery.base import Recovery, Trained

if TYPE_CHECKING:
    from winnow.recovery.base import Given


class Distill(Recovery):
    """All compressed matrices are trained together on the dense model's next-token distribution (KL divergence, temperature 1).
    The best state on the held-out windows is kept; the initial state if none is better."""

    reference = "knowledge distillation, arXiv 1503.02531; LoRA, arXiv 2106.09685"
    version = 2

    class Options(Trained):
        kind: Literal["distill"] = Field(description="distill")
        parameters: Literal["full", "lora"] = Field(
            "full",
            description="full: all parameters of the factors; lora: separate LoRA on every factor, so that merging is exact",
        )
        lora_rank: int = Field(8, ge=1, description="rank of LoRA on every factor")
        lora_alpha: float = Field(16.0, gt=0, description="the LoRA product is scaled by lora_alpha / lora_rank")
        nll: float = Field(0.0, ge=0, description="weight of the next-token loss added to the KL divergence")
        rate: float = Field(1e-3, gt=0, description="peak learning rate; cosine decay to 0")
        patience: int | None = Field(
            None,
            ge=1,
            description="early stopping: evaluations on held-out windows without improvement before training stops; null: never",
        )

        @property
        def libraries(self) -> tuple[str, ...]:
            return ("peft",) if self.parameters == "lora" else ()

        @model_validator(mode="after")
        def _lora_alone(self) -> Distill.Options:
            own = {key: getattr(self, key) for key in ("lora_rank", "lora_alpha")}
            if self.parameters == "full" and any(type(self).model_fields[key].default != value for key, value in own.items()):
                raise ValueError("`lora_rank` and `lora_alpha` are only used with `parameters: lora`")
            return self

    def recover(self, given: Given) -> dict[str, Any]:
        from winnow.recovery.distill import distill

        return distill(given)
