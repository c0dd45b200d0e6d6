"""Scores of a model on lm-eval tasks, compared with the dense model's per document."""

from __future__ import annotations

import io
import logging
import math
import numbers
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from winnow.data.tokens import check_known
from winnow.errors import InputError
from winnow.evaluation.spread import ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.evaluation.results import Scores

log = logging.getLogger(__name__)


class Harness(HFLM):
    """lm-eval's transformers model with log lines instead of progress bars. It fails at the first logit that is not finite, and
    at requests of unknown tokens."""

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        if not torch.isfinite(logits).all():
            row = int((~torch.isfinite(logits)).flatten(1).any(1).nonzero()[0])
            text = self.tokenizer.decode(inps[row][:48])
            raise FloatingPointError(f"logits are not finite for the request that begins {text[:80]!r}")
        return logits

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        log.info("%d requests of %d tokens at most", len(requests), max((len(a) + len(b) for _, a, b in requests), default=0))
        check_known(self.tokenizer, [[*context, *continuation] for _, context, continuation in requests])
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        check_known(self.tokenizer, [self.tok_encode(request.args[0]) for request in requests])
        return super().generate_until(requests, disable_tqdm=True)


def score(
    model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any], num_fewshot: int | None, limit: int | None, batch: int
) -> dict[str, Scores]:
    """{task: {measure: {value, value_se, per_document}}} by lm-eval's `simple_evaluate`, with its seeds and its prompts.

    A measure is named `metric`, or `metric,filter` if the task filters answers. `value_se` is None if lm-eval has no standard
    error. `per_document` is empty for a measure that is not a mean over documents. Raises FloatingPointError if a logit or a
    log-likelihood is not finite, and InputError if the tokenizer does not know most tokens of the requests.
    """
    lm = Harness(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    if lm.prefix_token_id is None:
        raise InputError(
            "the tokenizer has neither a BOS nor an EOS token, which lm-eval puts before a text; define one in the tokenizer"
        )
    loaded = TaskManager(include_defaults=False)  # empty: the tasks are loaded already
    with redirect_stderr(io.StringIO()):  # hides progress bars; warnings use logging
        found: Any = simple_evaluate(lm, tasks=list(tasks.values()), num_fewshot=num_fewshot, limit=limit, task_manager=loaded)
    scores: dict[str, Scores] = {}
    for name in tasks:
        samples, results = found["samples"][name], found["results"][name]
        _check_answers(name, samples)
        scores[name] = {}
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            of_metric = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
            scores[name][metric if filtered == "none" else key] = {
                "value": float(value),
                "value_se": float(error) if isinstance(error, numbers.Real) else None,
                "per_document": _mean_of(of_metric, float(value)),
            }
    return scores


def _check_answers(task: str, samples: list[dict[str, Any]]) -> None:
    """Raise FloatingPointError for a log-likelihood that is not finite; generated texts are skipped."""
    for sample in samples:
        for request in sample["resps"]:
            for answer in request:
                value = answer[0] if isinstance(answer, tuple | list) else answer
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"the log-likelihood of document {sample['doc_id']} of {task} is {value}")


def _mean_of(values: list[Any], value: float) -> list[float]:
    """The values per document as numbers if `value` is their mean; otherwise an empty list."""
    if not values or not all(isinstance(v, numbers.Real | np.bool_) for v in values):
        return []
    found = [float(v) for v in values]
    return found if math.isclose(math.fsum(found) / len(found), value, rel_tol=1e-9, abs_tol=1e-12) else []


def against(scores: dict[str, Scores], dense: dict[str, Scores]) -> dict[str, Scores]:
    """The scores with `delta` and `delta_se`: the differences to the dense model, paired by document.

    `delta_se` is None if a measure is not a mean over documents. Raises InputError if the documents differ.
    """
    for task, measures in scores.items():
        for name, one in measures.items():
            other = dense[task][name]
            if len(one["per_document"]) != len(other["per_document"]):
                raise InputError(f"{task}, {name}: the dense model has other documents; delete its result and run again")
            one["delta"], one["delta_se"] = one["value"] - other["value"], None
            if len(one["per_document"]) > 1:
                differences = np.subtract(one["per_document"], other["per_document"]).tolist()
                one["delta"], one["delta_se"] = ratio(differences, [1.0] * len(differences))
    return scores
