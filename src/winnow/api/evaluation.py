"""The loss of a model in memory, and windows of a text, as the workflow measures and cuts them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.api.given import as_it_was, checked
from winnow.data import tokens
from winnow.evaluation import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 4096  # of a forward pass, as `batch_tokens` of the rules: it changes rounding alone


def evaluate(model: PreTrainedModel, windows: Any, dense: PreTrainedModel | None = None, *, first: Any = 1) -> dict[str, Any]:
    """Measure the loss of a model of transformers on windows of text.

    Parameters
    ----------
    model
        A model of transformers that predicts the next token, compressed or not.
    windows
        Token ids, integers (windows, length); see `evaluation_windows`.
    dense
        The dense model, for comparison.
    first
        Index of the first scored token of a window, at least 1: one for all, or (windows,).

    Returns
    -------
    dict
        `nll`, nats per token, with its standard error over windows `nll_se`; `perplexity`; the numbers of `windows` and `tokens`.
        With `dense` also `delta_nll` (above the dense model, paired by window), `kl` (nats per token) and `top1_agreement`, each
        with its standard error (`_se`). `per_window` has the sums of every window.

    Raises
    ------
    InputError
        For windows that do not fit the model.
    FloatingPointError
        For logits that are not finite, naming the first module whose output is not.
    """
    ids = checked(windows, model)
    options = (ids, torch.as_tensor(first).expand(len(ids)), max(1, TOKENS // ids.shape[1]))
    with ExitStack() as stack:
        for one in (model, dense) if dense is not None else (model,):
            stack.enter_context(as_it_was(one))
        base: Any = {"per_window": perplexity.evaluate(dense, None, *options)} if dense is not None else None
        rows = perplexity.evaluate(model, dense, *options)
    return {**perplexity.summarize_windows(rows, base), "per_window": rows}


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, windows: int = 128, length: int = 1024, seed: int = 0
) -> Tensor:
    """Windows (windows, length) of a text that do not overlap, sampled without replacement, as a calibration of the workflow has
    them. Raises InputError if the text is too short, or if most of it is unknown to the tokenizer."""
    ids = tokens.encode(tokenizer, text, special_tokens=True)
    return torch.from_numpy(tokens.calibration_windows(ids, windows, length, seed)).long()


def evaluation_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int = 1024, windows: int | None = None) -> Tensor:
    """Windows (windows, length) of a text that do not overlap, from its beginning, as protocol p1 of the workflow cuts them; all
    by default. Raises InputError as `calibration_windows`."""
    ids = tokens.encode(tokenizer, text, special_tokens=True)
    return torch.from_numpy(tokens.evaluation_windows(ids, "p1", length, None, windows, None)[0]).long()
