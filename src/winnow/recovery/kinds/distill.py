from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.recovery.base import Recovery, Trained

if TYPE_CHECKING:
    from winnow.recovery.base import Task


class Distill(Recovery):
    """All compressed matrices at once learn the dense model's next-token distribution (KL divergence, temperature 1). The best
    state on the held-out windows is kept, the start where there is no better one."""

    reference = "knowledge distillation, arXiv 1503.02531; LoRA, arXiv 2106.09685"

    class Options(Trained):
        kind: Literal["distill"] = Field(description="distill")
        parameters: Literal["full", "lora"] = Field(
            "full", description="full: all numbers of the factors; lora: LoRA on every factor by itself, so that merging is exact"
        )
        lora_rank: int = Field(8, ge=1, description="of LoRA on every factor")
        lora_alpha: float = Field(16.0, gt=0, description="LoRA's product is scaled by lora_alpha / lora_rank")
        nll: float = Field(0.0, ge=0, description="weight of the loss of the text's next token beside the KL divergence")
        rate: float = Field(1e-3, gt=0, description="learning rate at its height; it falls to 0 as a cosine")
        patience: int | None = Field(None, ge=1, description="looks without a new best after which training ends; never if null")

        @property
        def libraries(self) -> tuple[str, ...]:
            return ("peft",) if self.parameters == "lora" else ()

        @model_validator(mode="after")
        def _lora_alone(self) -> Distill.Options:
            own = {key: getattr(self, key) for key in ("lora_rank", "lora_alpha")}
            if self.parameters == "full" and any(type(self).model_fields[key].default != value for key, value in own.items()):
                raise ValueError("`lora_rank` and `lora_alpha` belong to `parameters: lora`")
            return self

    def recover(self, task: Task) -> dict[str, Any]:
        from winnow.recovery.distill import recover

        return recover(task)
