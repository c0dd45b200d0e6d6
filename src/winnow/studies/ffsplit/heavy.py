"""Heavy hitters of FFNs: neurons with large outputs (FFSplit, arXiv 2401.04044), their concentration, and the loss without some
of them.

The output of an FFN is H = sum over neurons j of h_j V_j, plus the bias of its last matrix, with h = sigma(X U) or, gated,
act(gate) * up. The paper's score of a neuron is the sum over tokens of h_j^2 (`act`); the neuron's contribution to H has the
squared norm h_j^2 ||V_j||^2, whose sum over tokens is the other score (`act_x_row`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.models.architectures import Matrix, ffn_groups, moments_file, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.studies.ffsplit.found import Concentration

CRITERIA = ("act", "act_x_row")
MARKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)  # shares of the neurons of the concentration curve
SAMPLE = 256  # tokens on which the identities are checked


@dataclass(frozen=True)
class Ffn:
    """An FFN with its scores by criterion (f,) on the calibration tokens, float64; `norms` (f,): ||V_j||."""

    group: list[Matrix]
    norms: Tensor
    scores: dict[str, Tensor]

    @property
    def down(self) -> Matrix:
        return self.group[-1]

    def weights(self, criterion: str) -> Tensor:
        """(f,): the weight of h_j^2 in a criterion."""
        return self.norms.square() if criterion == "act_x_row" else torch.ones_like(self.norms)

    def top(self, criterion: str, share: float) -> Tensor:
        """The share of neurons with the largest scores; ties by position."""
        scores = self.scores[criterion]
        return scores.argsort(descending=True, stable=True)[: count_of(len(scores), share)]

    def bottom(self, criterion: str, share: float) -> Tensor:
        """The share of neurons with the smallest scores."""
        scores = self.scores[criterion]
        return scores.argsort(stable=True)[: count_of(len(scores), share)]


def count_of(neurons: int, share: float) -> int:
    return max(1, round(share * neurons))


def ffns_of(files: ModelFiles, moments: Bundle) -> list[Ffn]:
    """Every FFN with its scores: `act`, `act_x_row`, and `weight_norm` (squared, of all weights of the neuron). Experts of
    mixtures are skipped."""
    found = []
    for group in ffn_groups([m for m in files.matrices if m.expert is None]):
        *inner, down = group
        rms = moments.tensors(moments_file(down.layer))[f"{down.site}.rms"].double().cpu()
        norms = files.weight(down).norm(dim=0)
        own = sum(files.weight(m).square().sum(1).view(-1, len(norms)).sum(0) for m in inner)  # gate and up may be one matrix
        scores = {"act": rms.square(), "act_x_row": rms.square() * norms.square(), "weight_norm": own + norms.square()}
        found.append(Ffn(group, norms, scores))
    return found


@contextmanager
def hidden(model: PreTrainedModel, ffns: list[Ffn], length: int) -> Iterator[dict[int, Tensor]]:
    """{layer: hidden units (windows, length, f)} of the last forward pass."""
    seen: dict[int, Tensor] = {}
    hooks = []
    for ffn in ffns:

        def enter(_module: Any, args: Any, layer: int = ffn.down.layer) -> None:
            seen[layer] = tokens_of(args[0].detach(), length)

        hooks.append(model.get_submodule(ffn.down.module).register_forward_pre_hook(enter))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def zeroed(model: PreTrainedModel, chosen: dict[str, Tensor]) -> Iterator[None]:
    """Context manager that zeroes hidden units: {module of the FFN's last matrix: indices of hidden units}."""
    hooks = []
    for name, indices in chosen.items():

        def enter(_module: Any, args: Any, indices: Tensor = indices) -> tuple[Tensor]:
            return (args[0].index_fill(-1, indices.to(args[0].device), 0.0),)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(enter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def concentration(model: PreTrainedModel, ffns: list[Ffn], ids: Tensor, share: float) -> list[Concentration]:
    """Per layer and criterion, for the `share` of neurons that are heaviest on the calibration tokens: their part of the sum of
    scores there (`held`) and on other tokens ids (windows, length) (`held_elsewhere`), the part of them that is also among the
    heaviest there (`same`), their mean part of the sum of a single token (`per_token`), that of the heaviest neurons of each
    token (`per_token_best`); and `curve`, [[share, part], ...] on the calibration tokens."""
    sums: dict[tuple[int, str], list[Any]] = {}
    device, tokens = next(model.parameters()).device, 0
    with hidden(model, ffns, ids.shape[1]) as seen:
        for part in ids.split(max(1, 4096 // ids.shape[1])):
            real = (part >= 0).flatten()
            model.base_model(input_ids=part.clamp(min=0).to(device).long(), use_cache=False)
            tokens += int(real.sum())
            for ffn in ffns:
                squares = seen[ffn.down.layer].flatten(0, 1)[real.to(device)].double().square()
                for criterion in CRITERIA:
                    own = squares * ffn.weights(criterion).to(device)
                    whole = own.sum(1).clamp(min=1e-300)
                    heavy = ffn.top(criterion, share).to(device)
                    best = own.topk(len(heavy), dim=1).values
                    found = [own.sum(0), (own[:, heavy].sum(1) / whole).sum(), (best.sum(1) / whole).sum()]
                    before = sums.get((ffn.down.layer, criterion), [0.0] * 3)
                    sums[ffn.down.layer, criterion] = [a + b for a, b in zip(before, found, strict=True)]
    rows: list[Concentration] = []
    for ffn in ffns:
        for criterion in CRITERIA:
            scores, heavy = ffn.scores[criterion], ffn.top(criterion, share)
            elsewhere, fixed, best = (value.cpu() for value in sums[ffn.down.layer, criterion])
            there = elsewhere.argsort(descending=True, stable=True)[: len(heavy)]
            ordered = scores.sort(descending=True).values.cumsum(0) / scores.sum()
            rows.append(
                {
                    "layer": ffn.down.layer,
                    "criterion": criterion,
                    "neurons": len(scores),
                    "held": float(ordered[len(heavy) - 1]),
                    "held_elsewhere": float(elsewhere[heavy].sum() / elsewhere.sum()),
                    "same": len(set(heavy.tolist()) & set(there.tolist())) / len(heavy),
                    "per_token": float(fixed) / tokens,
                    "per_token_best": float(best) / tokens,
                    "curve": [[mark, float(ordered[count_of(len(scores), mark) - 1])] for mark in MARKS],
                }
            )
    return rows


@torch.no_grad()
def heavy_identities(model: PreTrainedModel, files: ModelFiles, ffns: list[Ffn], ids: Tensor) -> dict[str, float]:
    """Largest relative residuals over layers of exact identities, on the hidden units of one window, in float64."""
    worst = dict.fromkeys(
        (
            "without neuron j the output differs by sigma(X U_j) V_j",
            "the contributions of all neurons add up to H - b",
            "||sigma(X U_j) V_j|| = ||sigma(X U_j)|| ||V_j||",
            "the order of the neurons changes nothing",
        ),
        0.0,
    )
    with hidden(model, ffns, ids.shape[1]) as seen:
        model.base_model(input_ids=ids[:1].clamp(min=0).to(next(model.parameters()).device).long(), use_cache=False)
    for ffn in ffns:
        weight = files.weight(ffn.down)
        bias = files.tensor(f"{ffn.down.module}.bias").double() if ffn.down.bias else weight.new_zeros(len(weight))
        h = seen[ffn.down.layer].flatten(0, 1)[:SAMPLE].double().cpu()
        out = h @ weight.T + bias
        scale = float(out.norm()) + 1e-300
        added = torch.zeros_like(out)
        for j in range(len(ffn.norms)):
            added += torch.outer(h[:, j], weight[:, j])
        j = int(ffn.top("act", 0)[0])
        without = h.index_fill(1, torch.tensor([j]), 0.0) @ weight.T + bias
        one = torch.outer(h[:, j], weight[:, j])
        order = ffn.scores["act"].argsort(descending=True, stable=True)
        found = (
            float((out - without - one).norm()) / scale,
            float((out - bias - added).norm()) / scale,
            abs(float(one.norm()) - float(h[:, j].norm() * weight[:, j].norm())) / scale,
            float((h[:, order] @ weight[:, order].T + bias - out).norm()) / scale,
        )
        worst = {name: max(worst[name], value) for name, value in zip(worst, found, strict=True)}
    return worst
