"""`distill`: all factors are trained together on the dense model's next-token distribution.

LoRA is applied to every factor, not to the product W = L R: its product then has the shape of a factor, so that merging is exact,
needs no bytes and no second truncation, which would undo a part of the training. It also works for every structure of linear
maps. Factors that several modules share have no LoRA, which would split them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from winnow.errors import InputError
from winnow.io.resume import Resume
from winnow.models.classes import is_causal
from winnow.recovery.base import Given
from winnow.recovery.divergence import divergence, mean_of_windows, predictions
from winnow.recovery.rounded import trainable
from winnow.recovery.training import Progress, Saver, batches, train

log = logging.getLogger(__name__)


def distill(given: Given) -> dict[str, Any]:
    """Train `given.model`, see `_distill`."""
    with trainable(given):
        return _distill(given)


def _distill(given: Given) -> dict[str, Any]:
    """Train `given.model` in place; returns held-out losses by step (nats per token). Resumes after the last saved step.

    Raises InputError for a model without logits, and FloatingPointError, naming the tensor, if a gradient is not finite."""
    options, device = given.options, next(given.model.parameters()).device
    if options.nll and not is_causal(given.model.config):
        raise InputError(f"recovery: {type(given.model).__name__} does not predict the text's next tokens; leave `nll` at 0")
    windows, held = given.split()
    order = batches(len(windows), options.batch, options.steps, options.seed)
    whole = given.parameters()
    start = {name: parameter.detach().clone() for name, parameter in whole.items()}

    def loss(ids: Tensor) -> Tensor:
        """The mean over the tokens of windows (n, length)."""
        q, p = predictions(given, ids, "use `refine`")
        value = divergence(q, p)
        if options.nll:
            value = value - options.nll * q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        return value

    def held_out() -> float:
        return mean_of_windows(loss, held, options.batch, device)

    if not whole:  # an allocation may have chosen only rounded and dense matrices
        log.info("nothing to train: the model is left unchanged")
        return {"loss": "nats per token", "tokens": 0, "trained_numbers": 0, **Progress({0: held_out()}).report()}
    lora = options.parameters == "lora"
    trained = _with_lora(given, whole) if lora else whole
    saver = _Saver(given.resume, trained) if given.resume else None
    of_step = lambda step: loss(windows[order[step]].to(device).long())  # noqa: E731
    progress = train("distill", trained, of_step, held_out, options, {} if lora else given.dtypes, saver)
    report = progress.report()
    if lora:
        _merge(given)
        report["held_out_merged"] = _rounded(given, held_out)
        if report["held_out_merged"] >= report["held_out_start"]:
            with torch.no_grad():
                for name, parameter in whole.items():
                    parameter.copy_(start[name])
            report["best_step"] = 0
    if report["best_step"] == 0:
        log.info("the model is left unchanged, as the held-out loss did not improve")
    tokens = report["steps"] * options.batch * windows.shape[1]
    numbers = sum(parameter.numel() for parameter in trained.values())
    return {"loss": "nats per token", "tokens": tokens, "trained_numbers": numbers, **report}


def _with_lora(given: Given, whole: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Add LoRA to every linear map below the compressed modules; returns its parameters, and those of rounded matrices."""
    from peft import LoraConfig, inject_adapter_in_model  # only for `parameters: lora`

    users: dict[int, int] = {}
    for _, parameter in given.model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    inside = tuple(f"{name}." for name in given.modules)
    targets = [
        name
        for name, module in given.model.named_modules()
        if f"{name}.".startswith(inside) and isinstance(module, nn.Linear | Conv1D) and users[id(module.weight)] == 1
    ]
    rounded = {name: parameter for name, parameter in whole.items() if ".trained." in name}
    if not targets and rounded:
        return rounded
    if not targets:
        raise InputError("recovery: LoRA needs a factor that is a separate linear map, and there is none; use `parameters: full`")
    torch.manual_seed(given.options.seed)
    config = LoraConfig(
        r=given.options.lora_rank,
        lora_alpha=given.options.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(given.model.get_submodule(name), Conv1D) for name in targets),
    )
    inject_adapter_in_model(config, given.model)
    given.model.eval()
    return rounded | {name: p for name, p in given.model.named_parameters() if ".lora_" in name}


def _merge(given: Given) -> None:
    """Merge every LoRA product into its factor, and restore the factor's module."""
    from peft.tuners.lora import LoraLayer

    for name, module in [(n, m) for n, m in given.model.named_modules() if isinstance(m, LoraLayer)]:
        module.merge(safe_merge=True)  # type: ignore[operator]
        parent, _, child = name.rpartition(".")
        setattr(given.model.get_submodule(parent), child, module.get_base_layer())


@torch.no_grad()
def _rounded(given: Given, held_out: Any) -> float:
    """The held-out loss after rounding the parameters to their stored dtypes."""
    for name, parameter in given.parameters().items():
        parameter.copy_(parameter.to(given.dtypes[name]))
    return held_out()


class _Saver(Saver):
    """Saves parameters, Adam's moments, the best state and the losses, which are indexed by step."""

    def __init__(self, resume: Resume, parameters: dict[str, nn.Parameter]):
        self.resume, self.parameters = resume, parameters

    def restore(self, optimizer: torch.optim.Adam, progress: Progress) -> int:
        state = self.resume.load()
        if not state:
            return 0
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])
            moments = {key: state[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": state["adam_step"].clone(), **moments}
            progress.best[name] = state[f"best.{name}"].to(parameter.device)
        progress.losses = {int(step): loss for step, loss in state["losses"].tolist()}
        log.info("resuming after step %d of %s", int(state["done"]), self.resume.path)
        return int(state["done"])

    def save(self, done: int, optimizer: torch.optim.Adam, progress: Progress) -> None:
        found: dict[str, Tensor] = {"losses": torch.tensor(list(progress.losses.items()), dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            adam = optimizer.state[parameter]
            found |= {name: parameter.data, f"best.{name}": progress.best[name], "adam_step": adam["step"]}
            found |= {f"{key}.{name}": adam[key] for key in ("exp_avg", "exp_avg_sq")}
        self.resume.save(done, found)
