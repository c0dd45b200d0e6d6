"""Loss of a model on windows of text, compared with the dense model's, as sums and counts per window."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.data.tokens import PAD
from winnow.evaluation.spread import paired, ratio
from winnow.io.progress import every
from winnow.io.resume import Resume
from winnow.numerics.logits import tokens_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.checkpoint.streaming import Streamed
    from winnow.evaluation.hidden import Compared, Keeper
    from winnow.evaluation.results import Losses, PerWindow, Summary

STREAMED = 1 << 21  # logits at a time of a model that is run block by block, as memory is short


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dense: PreTrainedModel | Compared | None,
    ids: Tensor,
    first: Tensor,
    batch: int,
    resume: Resume | None = None,
    keeper: Keeper | None = None,
) -> PerWindow:
    """Per window: `nll` (sum, nats), `tokens` (scored), and with a dense model `kl` (sum of KL(dense || model)) and `agree`
    (number of tokens with the same top-1 prediction). `keeper`: keeps the hidden states of `model`.

    `ids` (windows, length) may end in PAD; `first` is the index of each window's first scored token. Log-softmax is computed in
    float64 from the model's logits. With `resume`, continues after the last window in the saved sums. Raises FloatingPointError,
    naming the module, if a logit is not finite.
    """
    device = next(model.parameters()).device
    keys = ("nll", "tokens", *(("kl", "agree") if dense is not None else ()))
    sums = {key: torch.zeros(len(ids), dtype=torch.float64) for key in keys}
    lengths = (ids != PAD).sum(1).tolist()
    kept = {} if keeper is None else keeper.state
    done = resume.restore(sums | kept) if resume else 0
    if keeper is not None and not keeper.holds(lengths[:done]):
        done = 0
    for chosen in every(_batches(lengths, batch, done), "evaluation batches"):
        x = ids[chosen][:, : lengths[chosen[0]]].to(device).long()
        logits = model(input_ids=x, use_cache=False).logits
        if not _all_finite(logits):
            raise FloatingPointError(f"logits are not finite in windows {chosen[0]} to {chosen[-1]}; {_culprit(model, x)}")
        if keeper is not None:
            keeper.write(chosen[0])
        reference = None if dense is None else _logits(dense, chosen, x)
        for row, window in enumerate(chosen):
            begin = int(first[window])
            pair = None if reference is None else reference[row, begin - 1 : -1]
            for key, value in _score(logits[row, begin - 1 : -1], x[row, begin:], pair).items():
                sums[key][window] = value
        if resume:
            resume.save(chosen[-1] + 1, sums | kept)
    return {key: values.tolist() for key, values in sums.items()}  # type: ignore[return-value]


def _logits(dense: PreTrainedModel | Compared, windows: list[int], ids: Tensor) -> Tensor:
    """The dense model's logits (windows, length, vocabulary)."""
    if isinstance(dense, torch.nn.Module):
        return dense(input_ids=ids, use_cache=False).logits
    return dense.logits(windows, ids)


@torch.no_grad()
def evaluate_by_block(
    model: Streamed, dense: Streamed | None, ids: Tensor, first: Tensor, batch: int, resume: Resume | None = None
) -> PerWindow:
    """Like `evaluate`, with only the weights of one block, or of the modules after the blocks, in memory at a time."""
    models = [model] if dense is None else [model, dense]
    keys = ("nll", "tokens", *(("kl", "agree") if dense is not None else ()))
    sums = {key: torch.zeros(len(ids), dtype=torch.float64) for key in keys}
    lengths = (ids != PAD).sum(1).tolist()
    for streamed in models:
        for layer in streamed.remaining():
            with streamed.block(layer):
                for chosen in every(_batches(lengths, batch, 0), f"evaluation batches of layer {layer}"):
                    x = ids[chosen][:, : lengths[chosen[0]]].to(streamed.device).long()
                    if not _all_finite(streamed.run(chosen[0], {"input_ids": x})):
                        where = f"windows {chosen[0]} to {chosen[-1]}"
                        raise FloatingPointError(f"the output of {streamed.names[layer]} is not finite in {where}")
            streamed.advance(layer)
    done = resume.restore(sums) if resume else 0
    with ExitStack() as stack:
        for streamed in models:
            stack.enter_context(streamed.passed())
        for window in every(range(done, len(ids)), "windows scored"):
            row = ids[window, : lengths[window]]
            for part in _parts(int(first[window]), len(row), model.vocabulary):
                before = slice(part.start - 1, part.stop - 1)  # the logits of a token are at the position before it
                logits, *others = (streamed.logits(window, row, before) for streamed in models)
                if not _all_finite(logits):
                    raise FloatingPointError(f"logits are not finite in window {window}; every block's output is finite")
                targets = row[part].to(model.device).long()
                for key, value in _score(logits, targets, others[0] if others else None).items():
                    sums[key][window] += value
            if resume:
                resume.save(window + 1, sums)
    return {key: values.tolist() for key, values in sums.items()}  # type: ignore[return-value]


def _parts(first: int, length: int, vocabulary: int) -> list[slice]:
    """The scored tokens of a window, in parts limited by the size of their logits."""
    step = max(1, STREAMED // vocabulary)
    return [slice(start, min(start + step, length)) for start in range(first, length, step)]


def _batches(lengths: list[int], batch: int, done: int) -> list[list[int]]:
    """Consecutive windows of equal length, at most `batch` at a time, from window `done` on."""
    found: list[list[int]] = []
    for window, length in list(enumerate(lengths))[done:]:
        if found and len(found[-1]) < batch and lengths[found[-1][0]] == length:
            found[-1].append(window)
        else:
            found.append([window])
    return found


def _all_finite(x: Tensor) -> bool:
    """Whether all numbers are finite, in one pass where `torch.isfinite` needs several; aminmax returns NaN if there is one."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _score(logits: Tensor, targets: Tensor, reference: Tensor | None) -> dict[str, float]:
    """Sums over the tokens of one window; logits (tokens, vocabulary). With logits x and y of the dense model, KL(dense || model)
    is the mean of y - x over the dense model's predictions, minus logsumexp(y), plus logsumexp(x)."""
    sums = {"nll": 0.0, "tokens": float(len(targets))} | ({"kl": 0.0, "agree": 0.0} if reference is not None else {})
    step = tokens_at_once(logits)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        x = logits[part].double()
        first, summed, top = _exponentials(x)[1:]
        total = first + summed.log()
        sums["nll"] += float((total - x.gather(1, targets[part, None])).sum())
        if reference is not None:
            y = reference[part].double()
            weights, most, weight, predicted = _exponentials(y)
            mean = torch.linalg.vecdot(weights, y.sub_(x))[:, None] / weight
            sums["kl"] += float((mean - (most + weight.log()) + total).sum())
            sums["agree"] += float((predicted == top).sum())
    return sums


def _exponentials(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(e^(x - the largest) (tokens, vocabulary), the largest, the sum of the first, the place of the largest (tokens, 1))"""
    largest, place = x.max(-1, keepdim=True)
    found = (x - largest).exp_()
    return found, largest, found.sum(-1, keepdim=True), place


def _culprit(model: PreTrainedModel, x: Tensor) -> str:
    """The first module whose output is not finite."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _args, output):
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
            if not found and any(not torch.isfinite(t).all() for t in tensors if t.is_floating_point()):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not list(m.children())]
    model(input_ids=x, use_cache=False)
    for hook in hooks:
        hook.remove()
    return f"the first module with such an output is {found[0]}" if found else "every module's output is finite"


def summarize_windows(rows: PerWindow, dense: Losses | None) -> Summary:
    """Totals, means and standard errors of per-window sums; differences to `dense` (its record) are paired."""
    counts = rows["tokens"]
    nll, nll_se = ratio(rows["nll"], counts)
    result: Summary = {
        "windows": len(counts),
        "tokens": int(sum(counts)),
        "nll_sum": math.fsum(rows["nll"]),
        "nll": nll,
        "nll_se": nll_se,
        "perplexity": math.exp(nll),
    }
    if "kl" in rows:
        result["kl"], result["kl_se"] = ratio(rows["kl"], counts)
        result["top1_agreement"], result["top1_agreement_se"] = ratio(rows["agree"], counts)
    if dense is not None:
        result["delta_nll"], result["delta_nll_se"] = paired(rows, dense["per_window"])
    return result
