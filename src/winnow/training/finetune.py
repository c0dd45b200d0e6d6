"""Supervised training of a classifier on the train rows of a task, and the directory of the tuned model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from winnow.data.examples import Examples, padding_of, takes_types
from winnow.errors import InputError
from winnow.io.artifacts import file_digest
from winnow.io.progress import every
from winnow.io.resume import Resume
from winnow.models.classes import classes_of, read_config
from winnow.models.weights import copy_files
from winnow.training.options import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io.records import BaseManifest

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # newly initialised weights are logged here, or refused
log = logging.getLogger(__name__)
EPS, BETAS = 1e-8, (0.9, 0.999)  # of AdamW


def verified(base: BaseManifest) -> Path:
    """The directory of a retrieved base model. Raises InputError if one of its files has changed."""
    directory = Path(base["directory"])
    for name, digest in base["files"].items():
        if not (directory / name).is_file() or file_digest(directory / name) != digest:
            raise InputError(f"{directory / name}: changed since it was retrieved; run snakemake --forcerun retrieve_base")
    return directory


def load_base(directory: Path, labels: list[str], tokenizer: Any, seed: int, device: str) -> PreTrainedModel:
    """The model of a directory with a classification head for `labels`, in float32; a head that is not in the files is
    initialised with `seed`. Raises InputError if the family has no such head, or if other weights are missing."""
    from transformers import AutoModelForSequenceClassification

    config = read_config(directory)
    if "SEQUENCE_CLASSIFICATION" not in classes_of(config):
        raise InputError(f"{directory}: transformers has no classifier for a {config.model_type} model")
    if config.pad_token_id is None:
        filling = [tokenizer.pad_token_id, tokenizer.eos_token_id]
        config.pad_token_id = next((token for token in filling if token is not None), None)
    torch.manual_seed(seed)
    head = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    for key, value in head.items():
        setattr(config, key, value)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the head of another task is replaced; other mismatches are refused below
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, report = loaded
    drawn = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    for name in drawn:
        if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name:
            raise InputError(f"{directory}: {name} is missing from the weights, or has another shape than in the config")
    log.info("%s: new weights: %s; not used: %s", type(model).__name__, drawn, sorted(report["unexpected_keys"]))
    model.config.problem_type = "single_label_classification"
    return model.to(device)


def train_classifier(
    model: PreTrainedModel, examples: Examples, outputs: list[int], tuning: Tuning, resume: Resume | None = None
) -> dict[str, Any]:
    """Train all weights of the model in place; returns {steps, rows, loss of the first and the last steps (nats)}.

    Order and dropout of a step only depend on the seed and the step, so that an interrupted training is resumed with identical
    results. Raises InputError, with the step, if the loss is not finite.
    """
    pad, types, device = padding_of(model.config), takes_types(model.config), str(model.device)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [p for p in weights.values() if p.dim() < 2]
    groups = [
        {"params": [p for p in weights.values() if p.dim() >= 2], "weight_decay": tuning.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=tuning.rate, eps=EPS, betas=BETAS)
    total, rows = tuning.total_steps(len(examples.ids)), len(examples.ids)
    losses = torch.zeros(total, dtype=torch.float64)
    state = _state(weights, optimiser) | {"losses": losses}
    begin = resume.restore(state) if resume else 0
    targets = torch.tensor(outputs)
    model.train()
    for step in every(range(begin, total), "steps"):
        chosen = _rows_of_step(step, tuning.batch, rows, tuning.seed)
        torch.manual_seed(tuning.seed * 1_000_003 + step)  # of dropout
        logits = model(**examples.batch(chosen, pad, types, device)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits, targets[examples.labels[chosen]].to(device))
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} at step {step + 1} of {total}; lower `rate`, or raise `warmup`")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), tuning.clip)
        for group in optimiser.param_groups:
            group["lr"] = tuning.rate_at(step, total)
        optimiser.step()
        losses[step] = loss.item()
        if (step + 1) % max(1, total // 20) == 0:
            log.info("step %d of %d: loss %.4f", step + 1, total, losses[max(0, step - 19) : step + 1].mean())
        if resume:
            resume.save(step + 1, state)
    model.eval()
    few = max(1, total // 10)
    return {"steps": total, "rows": rows, "first_loss": float(losses[:few].mean()), "last_loss": float(losses[-few:].mean())}


def _state(weights: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors that a step changes in place, by name; AdamW's state is created before its first step."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        own = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(0.0)}
        optimiser.state[weight] = own
        found |= {f"{name}.{key}": value for key, value in own.items()} | {name: weight.data}
    return found


def _rows_of_step(step: int, batch: int, rows: int, seed: int) -> list[int]:
    """The rows of a step: every epoch has a different order, and a step may extend into the next epoch."""
    found: list[int] = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(place, rows)
        if not found or index == 0:
            order = np.random.default_rng([seed, epoch]).permutation(rows)
        found.append(int(order[index]))
    return found


def write_tuned(directory: Path, model: PreTrainedModel, source: Path, names: list[str]) -> None:
    """Write a Hugging Face directory: config with the names of the classes, weights in float32, and the tokenizer files of
    `source` among `names`."""
    model.save_pretrained(directory)
    copy_files(names, source, directory)
