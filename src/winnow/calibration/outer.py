"""Statistics of the token embeddings and of the head, from one forward and backward pass over the calibration windows.

A change D of the head (vocabulary, width) changes the logits of a token by D x, with x its final hidden state, and the loss by
1/2 sum_ij H_ij (D x)_i (D x)_j with H = diag(p) - p p^T the curvature of the loss at probabilities p. Its diagonal p (1 - p) is
used, since the whole of it would have as many numbers as the vocabulary squared: 1/2 tr(Q D C D^T) with C = E[x x^T] and the
diagonal Q = E[p (1 - p)]. Errors of rounding are nearly independent between rows, so that the rest is small.

A change D of the embeddings changes the loss by 1/2 E[(D_t g)^2] for the row D_t of a token t and the gradient g of the loss at
its embedding: 1/2 tr(P D F D^T) with F = E[g g^T] and the diagonal P of the frequencies of tokens. Both have the same form: rows
are independent, and have a weight each.

If embeddings and head are one matrix, both predicted losses are added (`predict_losses` reads both). For error feedback, which
needs one metric for all rows, they are added as if F and C were proportional: weights of rows are P tr F + Q tr C, and the metric
of a row is F + sum(Q) C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.calibration.gradients import logits_of, loss_of
from winnow.errors import InputError
from winnow.io.progress import every
from winnow.models.architectures import Matrix
from winnow.numerics.host import on_host
from winnow.numerics.products import add_product, mean_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 22  # logits in float32 at a time
LEAST = 1e-6  # the smallest weight of a row, as a share of their mean: p (1 - p) of a token that never occurs can be 0 in float32


class Sums:
    """Sums over tokens of embeddings e (n,) with gradients g, and of final hidden states x (n,) with logits of `vocabulary`
    tokens; float64, products in `precision`."""

    def __init__(self, width: tuple[int, int], vocabulary: int, precision: torch.dtype, device: Any):
        self.precision, self.count = precision, 0
        self.gradients, self.hidden = (torch.zeros(n, n, dtype=torch.float64, device=device) for n in width)
        self.curvature, self.seen = (torch.zeros(vocabulary, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, ids: Tensor, gradients: Tensor, hidden: Tensor | None, logits: Tensor, cap: float | None) -> None:
        """Add tokens `ids` (t,), gradients (t, n) at their embeddings, final hidden states (t, n) and logits (t, vocabulary),
        which are capped at `cap` if it is given."""
        self.count += len(ids)
        self.seen += torch.bincount(ids, minlength=len(self.seen))
        g = gradients.to(self.precision)
        add_product(self.gradients, g, g, self.precision)
        if hidden is None:
            return
        x = hidden.to(self.precision)
        add_product(self.hidden, x, x, self.precision)
        for part in logits.split(max(1, CHUNK // logits.shape[-1])):
            p = torch.softmax(part.float(), dim=-1)
            curvature = p * (1 - p)
            if cap is not None:  # the derivative of cap * tanh(logit / cap)
                curvature *= (1 - (part.float() / cap).square()).square()
            self.curvature += curvature.sum(0, dtype=torch.float64)

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """{role: statistics}: `gram`, the metric of a row (n, n), and `gradient_gram`, the weights of rows (vocabulary,)."""
        found = {"embed_tokens": (mean_of(self.gradients, torch.tensor(self.count), self.precision), frequencies(self.seen))}
        if float(self.hidden.diagonal().sum()) > 0:
            weights = self.curvature / self.count
            weights = weights.clamp(min=LEAST * float(weights.mean()))
            found["lm_head"] = (mean_of(self.hidden, torch.tensor(self.count), self.precision), weights)
        return {role: _site(gram, rows, self.precision, self.count) for role, (gram, rows) in found.items()}


def frequencies(seen: Tensor) -> Tensor:
    """(vocabulary,): expected frequencies of tokens in other text, which sum to 1, from how often each was seen. Tokens that were
    not seen share the frequency that those seen once had together (Good and Turing), at least that of one more token."""
    count, unseen = float(seen.sum()), seen == 0
    if not unseen.any():
        return seen / count
    new = min(0.5, max(1.0, float((seen == 1).sum())) / (count + 1))
    return torch.where(unseen, new / int(unseen.sum()), seen * ((1 - new) / count))


def both(embeddings: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of one matrix with both roles, for error feedback; see the module."""
    (f, p), (c, q) = ((own["gram"].double(), own["gradient_gram"].double()) for own in (embeddings, head))
    rows = p * f.trace() + q * c.trace()
    gram = f + q.sum() * c
    return _site(gram, rows / gram.trace(), embeddings["gram"].dtype, int(embeddings["count"]))


def _site(gram: Tensor, rows: Tensor, precision: torch.dtype, count: int) -> dict[str, Tensor]:
    found = {"gram": gram, "rms": gram.diagonal().clamp(min=0).sqrt(), "gradient_gram": rows}
    return {**{key: on_host(value.to(precision)) for key, value in found.items()}, "count": torch.tensor(count)}


def collect_outer(
    model: PreTrainedModel,
    matrices: list[Matrix],
    windows: Tensor,
    batch: int,
    precision: torch.dtype,
    labels: str,
    seed: int,
    first_token: bool = True,
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield (layer, {role: statistics}) of the embeddings and the head (`matrices`) of a model, dense or compressed, after a
    forward and a backward pass of `windows` (count, length). Labels and errors are those of `collect_gradients`; raises
    InputError for rows of a task."""
    if (windows < 0).any():
        raise InputError("embeddings and head need windows of a text, not rows of a task; remove them from the budget's targets")
    model.requires_grad_(False)
    device = next(iter(model.state_dict().values())).device
    embeddings: Any = model.get_input_embeddings()
    head: Any = next((m.head or m.module for m in matrices if m.role != "embed_tokens"), None)
    scale = float(getattr(embeddings, "scalar_embed_scale", None) or getattr(embeddings, "factor", None) or 1.0)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    kept: dict[str, Tensor] = {}

    def embedded(_module: Any, _args: Any, output: Tensor) -> None:
        kept["embedded"] = output.requires_grad_()

    def read(_module: Any, args: tuple[Tensor, ...]) -> None:
        kept["hidden"] = args[0].detach()

    hooks = [embeddings.register_forward_hook(embedded)]
    hooks += [model.get_submodule(head).register_forward_pre_hook(read)] if head else []
    (vocabulary, width), skipped = matrices[0].shape, 0 if first_token else 1
    sums = Sums((width, matrices[-1].shape[1]), vocabulary, precision, device)
    try:
        for start in every(range(0, len(windows), batch), "batches of embeddings and head"):
            ids = windows[start : start + batch].to(device).long()
            with torch.enable_grad():
                logits = logits_of(model, ids, labels)
                loss = loss_of(logits, ids, labels, seed, start)
            (gradient,) = torch.autograd.grad(loss, kept["embedded"])
            own = [x[:, skipped:].flatten(0, 1) for x in (ids, gradient, logits.detach())]
            hidden = kept["hidden"][:, skipped:].flatten(0, 1) if head else None
            sums.add(own[0], own[1] * scale, hidden, own[2], cap)
            kept.clear()
    finally:
        for hook in hooks:
            hook.remove()
    found = sums.finish()
    for role, values in found.items():
        if not all(torch.isfinite(value).all() for value in values.values()):
            raise FloatingPointError(f"statistics of {role} are not finite")
    layers: dict[int, dict[str, dict[str, Tensor]]] = {}
    for m in matrices:
        layers.setdefault(m.layer, {})[m.role] = both(*found.values()) if m.role == "tied" else found[m.role]
        layers[m.layer] |= found if m.role == "tied" else {}
    yield from layers.items()
