"""Second moments of the gradient of the loss at the output of every matrix, from one forward and backward pass.

The loss of a window is the sum over its tokens; labels are sampled from the model (Fisher information) or are the next tokens of
the text (empirical Fisher).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import InputError
from winnow.io.progress import every
from winnow.io.resume import Resume
from winnow.models.architectures import Matrix, tokens_of
from winnow.models.classes import is_causal
from winnow.numerics.products import gram_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class OutputMoments:
    """Sums of one matrix (m, n), float64; products are computed in `precision`."""

    precision: torch.dtype
    count: Tensor  # (): tokens
    gram: Tensor  # (m, m): sum over tokens of g g^T
    fisher: Tensor  # (m,): sum over windows and columns j of (dL/dW_ij)^2

    def accumulate(self, x: Tensor, g: Tensor) -> None:
        """Add inputs x (windows, tokens, n) and gradients g (windows, tokens, m)."""
        x, g = x.to(self.precision), g.to(self.precision)
        self.count += g.shape[0] * g.shape[1]
        flat = g.flatten(0, 1)
        self.gram += gram_of(flat)
        # sum_j (sum_t g_ti x_tj)^2 = sum_tt' g_ti (x x^T)_tt' g_t'i, without forming the gradient of the matrix
        self.fisher += (g * ((x @ x.mT) @ g)).sum((0, 1), dtype=torch.float64)

    def finish(self) -> dict[str, Tensor]:
        """Per-token means in `precision`: gradient_gram (m, m) and fisher (m,)."""
        gram = self.gram / self.count
        means = {"gradient_gram": (gram + gram.T) / 2, "fisher": self.fisher.clamp(min=0) / self.count}
        return {name: value.to(self.precision).cpu() for name, value in means.items()}


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per position (tokens,), sampled from logits (tokens, vocabulary); the same for every batch size and device."""
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    below = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    return torch.searchsorted(below, uniform * below[:, -1:]).flatten().clamp(max=logits.shape[-1] - 1)


def _logits(model: PreTrainedModel, ids: Tensor, labels: str) -> Tensor:
    """Logits (windows, labelled positions, classes): one position per token, or per window for a classifier. Raises InputError
    for a model without logits, or with logits that the text has no labels for."""
    found = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    name = type(model).__name__
    if found is None or found.shape[-1] < 2:
        raise InputError(f"{name} has no logits, and so no loss for gradients; use a metric without gradients")
    if labels == "text" and not is_causal(model.config):
        raise InputError(f"gradient_labels: {name} does not predict the text's next tokens; use `model`")
    return found if found.dim() == 3 else found[:, None]


def collect_gradients(
    model: PreTrainedModel,
    matrices: list[Matrix],
    windows: Tensor,
    batch: int,
    precision: torch.dtype,
    labels: str,
    seed: int,
    first_token: bool = True,
    resume: Resume | None = None,
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield (layer, {role: statistics}) after a forward and a backward pass of `windows` (count, length).

    `labels`: `model` (sampled with `seed`) or `text`. Experts of a mixture are skipped: their gradients come from few tokens.
    With `resume`, continues after the last window in the saved sums. Raises FloatingPointError, naming the module, if a gradient
    is not finite.
    """
    if (windows < 0).any():
        raise InputError("gradients need windows of a text, not rows of a task; use a metric without gradients")
    matrices = [m for m in matrices if m.expert is None]
    model.requires_grad_(False)
    device = next(model.parameters()).device
    length, skipped = windows.shape[1], 0 if first_token else 1
    sums: dict[str, OutputMoments] = {}
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _m, _args, output: output.requires_grad_())]

    def watch(matrix: Matrix):
        def forward(_module, args, output):
            x = tokens_of(args[0].detach(), length)[:, skipped:]
            output.register_hook(lambda g: sums[matrix.name].accumulate(x, tokens_of(g, length)[:, skipped:]))

        return forward

    for matrix in matrices:
        m = matrix.shape[0]
        zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((m, m), (m,))]
        sums[matrix.name] = OutputMoments(precision, torch.tensor(0), *zeros)
        hooks.append(model.get_submodule(matrix.module).register_forward_hook(watch(matrix)))
    saved = {f"{n}.{key}": getattr(s, key) for n, s in sums.items() for key in ("count", "gram", "fisher")}
    try:
        done = resume.restore(saved) if resume else 0
        for start in every(range(done, len(windows), batch), "gradient batches"):
            ids = windows[start : start + batch].to(device).long()
            with torch.enable_grad():
                logits = _logits(model, ids, labels)
                if labels == "text":
                    logits, targets = logits[:, :-1], ids[:, 1:]
                else:
                    draws = [torch.Generator().manual_seed(seed * 1_000_003 + start + row) for row in range(len(ids))]
                    with torch.no_grad():
                        targets = torch.stack([sampled(*pair) for pair in zip(logits, draws, strict=True)])
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
            if resume:
                resume.save(start + batch, saved)
    finally:
        for hook in hooks:
            hook.remove()
    expected = len(windows) * (length - skipped)
    for layer in sorted({m.layer for m in matrices}):
        found = {}
        for matrix in (m for m in matrices if m.layer == layer):
            if (count := int(sums[matrix.name].count)) != expected:
                raise RuntimeError(f"{matrix.module}: saw gradients of {count} tokens of {expected}")
            if not torch.isfinite(sums[matrix.name].gram).all():
                raise FloatingPointError(f"{matrix.module}: the gradient of its output is not finite")
            found[matrix.role] = sums.pop(matrix.name).finish()
        yield layer, found
