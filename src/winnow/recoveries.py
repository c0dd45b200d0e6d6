"""What can follow compression: the kinds of presets in the section `recoveries`. Each but `none` is a module of
`winnow.recovery`, which has its own name."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from winnow.fields import Strict
from winnow.tuning import Tuning


class Recovery(Strict):
    """What is done after compression to win back quality."""

    version: ClassVar[int] = 1
    whole: ClassVar[bool] = False  # whether all numbers of the model are trained, not those of its compressed modules only
    kind: str
    after: str | None = Field(None, description="another recovery by its name: this one goes on from the checkpoint that it made")

    @property
    def reads_gradients(self) -> bool:
        """Whether it reads the second moments of the loss's gradient in every output."""
        return False

    @property
    def libraries(self) -> tuple[str, ...]:
        """What it uses beside what every recovery does, and whose version can change what it makes."""
        return ()


class Trained(Recovery):
    """A recovery that trains on the calibration windows, a share of which is held out and never trained on."""

    steps: int = Field(200, ge=1, description="steps of Adam; tokens trained on are steps x batch x length of the calibration")
    batch: int = Field(8, ge=1, description="windows per step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the rate grows to its full height")
    norms: bool = Field(False, description="also train the layers' other vectors: weights of norms, biases of dense matrices")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the calibration windows that only choose the best state")
    every: int = Field(20, ge=1, description="steps between two looks at the held-out windows")
    seed: int = Field(0, ge=0, description="order of the windows, and start of LoRA")


class NoRecovery(Recovery):
    """The checkpoint is evaluated as compressed."""

    kind: Literal["none"] = Field(description="none")
    after: None = Field(default=None, description="always null")


class Refine(Trained):
    """Block by block, in order: the compressed block gets what the refined model below it produces, and learns what the dense
    block gives. No label and no loss of the model is used. A block is as it was where training makes it no better on the
    held-out windows. As block refinement in AA-SVD, arXiv 2604.02119."""

    kind: Literal["refine"] = Field(description="refine")
    objective: Literal["anchored", "shifted"] = Field(
        "anchored", description="anchored: the dense block's output in the dense model; shifted: on the compressed block's inputs"
    )
    rate: float = Field(
        1e-3,
        gt=0,
        description="learning rate at its height, less for blocks whose held-out loss is below 0.002 of the target's mean "
        "square; it falls to 0 as a cosine",
    )
    patience: int | None = Field(5, ge=1, description="looks without a new best after which a block is finished; never if null")


class Sequential(Recovery):
    """Low-rank factors fitted anew in closed form, matrix by matrix in the order that the model computes, to the inputs that the
    compressed model makes; nothing is trained. A block is as it was where this brings its output no nearer to the dense block's
    on the held-out windows; with `outputs: gradient` the model, where its predictions come no nearer to the dense model's.
    Objectives 4 and 2 of AA-SVD, arXiv 2604.02119; a ridge keeps what hardly occurs in the calibration text as it was."""

    kind: Literal["sequential"] = Field(description="sequential")
    objective: Literal["anchored", "shifted"] = Field(
        "anchored", description="anchored: the dense matrix's output in the dense model; shifted: on the compressed one's inputs"
    )
    outputs: Literal["equal", "gradient"] = Field(
        "equal",
        description="equal: all errors of a matrix's output count alike, as published; gradient: by the second moment of the "
        "loss's gradient in them, as in the metric `two_sided`, and the model is judged by its predictions, not by its blocks",
    )
    biases: Literal["kept", "fitted"] = Field(
        "kept", description="fitted: biases that matrices have take up the mean of their outputs' errors; none is added"
    )
    batch: int = Field(8, ge=1, description="windows at a time")
    held_out: float = Field(0.125, gt=0, lt=1, description="share of the calibration windows that only judge the blocks")

    @property
    def reads_gradients(self) -> bool:
        return self.outputs == "gradient"


class Distill(Trained):
    """All compressed matrices at once learn the dense model's next-token distribution (KL divergence, temperature 1). The best
    state on the held-out windows is kept, the start where there is no better one."""

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
    def _lora_alone(self) -> Distill:
        own = {key: getattr(self, key) for key in ("lora_rank", "lora_alpha")}
        if self.parameters == "full" and any(type(self).model_fields[key].default != value for key, value in own.items()):
            raise ValueError("`lora_rank` and `lora_alpha` belong to `parameters: lora`")
        return self


class Finetune(Tuning, Recovery):
    """Fine-tuning again, with the labels of a classification task: all weights learn its train rows, as a model's `finetune`
    does before compression, with options of its own."""

    whole: ClassVar[bool] = True
    kind: Literal["finetune"] = Field(description="finetune")


def _kinds(of: type[Recovery]) -> list[type[Recovery]]:
    own = [of] if get_args(of.model_fields["kind"].annotation) else []
    return own + [found for sub in of.__subclasses__() for found in _kinds(sub)]


RECOVERIES: dict[str, type[Recovery]] = {get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in _kinds(Recovery)}

if TYPE_CHECKING:
    AnyRecovery = Recovery
else:  # a union of what is registered, which a type checker cannot see
    AnyRecovery = Annotated[reduce(or_, RECOVERIES.values()), Field(discriminator="kind")]


def options_of(spec: dict) -> Recovery:
    """The options that a resolved specification ({kind, ...}) holds; without those of the recovery that it goes on from."""
    return RECOVERIES[spec["kind"]].model_validate({key: value for key, value in spec.items() if key != "after"})
