"""Linear recoverability of FFN blocks: least squares from a block's inputs to its outputs, held out, from moments by fold.

Inputs X (tokens, d) are those of the FFN after its norm, outputs Y (tokens, d) those before the residual connection. One forward
pass collects, for every fold of windows, float64 sums from which all least-squares results are computed exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.models.architectures import Matrix, ffn_groups, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.studies.linearity.found import Scores

PRECISION = 1e-13  # eigenvalues of X^T X below this share of the largest are treated as 0


@dataclass
class Sums:
    """Sums over tokens, float64: xx (d + 1, d + 1) of [X, 1], xy (d + 1, d), and yy (d,) of the squared outputs."""

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Sums:
        """From rows x (tokens, d), y (tokens, d)."""
        x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
        y = y.double()
        return cls(x.T @ x, x.T @ y, y.square().sum(0))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.xx - other.xx, self.xy - other.xy, self.yy - other.yy)

    @property
    def count(self) -> float:
        return float(self.xx[-1, -1])


def total(sums: Iterable[Sums]) -> Sums:
    first, *rest = sums
    for other in rest:
        first = first + other
    return first


def least_squares(train: Sums) -> Tensor:
    """The minimum-norm [W; b] (d + 1, d) that minimises ||[X, 1] [W; b] - Y||_F."""
    values, vectors = torch.linalg.eigh(train.xx)
    kept = values > PRECISION * values[-1]
    return vectors[:, kept] @ ((vectors[:, kept].T @ train.xy) / values[kept, None])


def residual(fit: Tensor, test: Sums) -> Tensor:
    """Sum of squared residuals of every output (d,) on the test tokens."""
    left = test.yy - 2 * (fit * test.xy).sum(0) + (fit * (test.xx @ fit)).sum(0)
    return left.clamp(min=0)


def r2_scores(fit: Tensor, test: Sums) -> Scores:
    """R^2 on the test tokens by three definitions: relative to the grand mean of all outputs (`scalar`, as published), to every
    output's own mean (`feature`), and the median over outputs of their R^2 (`median`)."""
    left, n = residual(fit, test), test.count
    means = test.xy[-1] / n
    own = (test.yy - n * means.square()).clamp(min=1e-300)
    grand = float(test.yy.sum()) - n * len(means) * float(means.mean()) ** 2
    return {
        "scalar": 1 - float(left.sum()) / grand,
        "feature": 1 - float(left.sum() / own.sum()),
        "median": float((1 - left / own).median()),
    }


def reduced_rank(train: Sums, test: Sums) -> list[float]:
    """Feature-wise R^2 on the test tokens of reduced-rank regression with ranks 0..d: least squares on centred data, its
    predictions projected onto their leading directions on the training tokens."""
    fit, n = least_squares(train), train.count
    slope = fit[:-1]
    centred = train.xx[:-1, :-1] - torch.outer(train.xx[-1, :-1], train.xx[-1, :-1]) / n
    directions = torch.linalg.eigh(slope.T @ centred @ slope).eigenvectors.flip(1)
    means_x, means_y, m = train.xx[-1, :-1] / n, train.xy[-1] / n, test.count
    # Test moments about the training means.
    sum_x, sum_y = test.xx[-1, :-1], test.xy[-1]
    xx = test.xx[:-1, :-1] - torch.outer(sum_x, means_x) - torch.outer(means_x, sum_x) + m * torch.outer(means_x, means_x)
    xy = test.xy[:-1] - torch.outer(sum_x, means_y) - torch.outer(means_x, sum_y) + m * torch.outer(means_x, means_y)
    yy = float((test.yy - 2 * sum_y * means_y + m * means_y.square()).sum())
    cross = ((slope.T @ xy) * 1.0 @ directions * directions).sum(0)
    square = ((slope.T @ xx @ slope) @ directions * directions).sum(0)
    left = yy - torch.cat([cross.new_zeros(1), (2 * cross - square).cumsum(0)])
    own = float((test.yy - sum_y.square() / m).sum())
    return (1 - left / own).tolist()


def rank_for_share(profile: list[float], share: float) -> int:
    """The smallest rank that reaches `share` of the full rank's R^2."""
    return next(k for k, value in enumerate(profile) if value >= share * profile[-1])


@dataclass(frozen=True)
class Block:
    """An FFN: the module whose input is X, and the one whose output is Y."""

    layer: int
    enters: str
    leaves: str
    numbers: int  # stored in its matrices and biases


def ffn_blocks(matrices: list[Matrix]) -> list[Block]:
    """The FFN of every layer; experts of mixtures are skipped."""
    found = []
    for group in ffn_groups([m for m in matrices if m.expert is None]):
        numbers = sum(m.shape[0] * m.shape[1] + m.shape[0] * m.bias for m in group)
        found.append(Block(group[0].layer, group[0].module, group[-1].module, numbers))
    return found


@contextmanager
def tapped(model: PreTrainedModel, blocks: list[Block], length: int) -> Iterator[dict[int, dict[str, Tensor]]]:
    """{layer: {x, y}} (windows, length, d) of the last forward pass."""
    seen: dict[int, dict[str, Tensor]] = {block.layer: {} for block in blocks}
    hooks = []
    for block in blocks:
        own = seen[block.layer]

        def enter(_module: Any, args: Any, own: dict[str, Tensor] = own) -> None:
            own["x"] = tokens_of(args[0].detach(), length)

        def leave(_module: Any, _args: Any, output: Any, own: dict[str, Tensor] = own) -> None:
            own["y"] = tokens_of(output.detach(), length)

        hooks.append(model.get_submodule(block.enters).register_forward_pre_hook(enter))
        hooks.append(model.get_submodule(block.leaves).register_forward_hook(leave))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def collect_sums(
    model: PreTrainedModel, blocks: list[Block], windows: Tensor, folds: int, batch: int
) -> dict[int, list[tuple[Sums, Sums]]]:
    """{layer: for every fold (sums of all tokens, sums of the windows' first tokens)} of windows (count, length); folds are
    consecutive windows. Raises FloatingPointError with the layer if an output is not finite."""
    found: dict[int, list[tuple[Sums, Sums]]] = {block.layer: [] for block in blocks}
    device = next(model.parameters()).device
    with tapped(model, blocks, windows.shape[1]) as seen:
        for part in windows.tensor_split(folds):
            sums: dict[int, list[tuple[Sums, Sums]]] = {block.layer: [] for block in blocks}
            for ids in part.split(batch):
                model.base_model(input_ids=ids.to(device).long(), use_cache=False)
                for layer, own in seen.items():
                    x, y = own["x"], own["y"]
                    every = Sums.of(x.flatten(0, 1), y.flatten(0, 1))
                    sums[layer].append((every, Sums.of(x[:, 0], y[:, 0])))
            for layer, pairs in sums.items():
                if not torch.isfinite(pairs[0][0].xy).all():
                    raise FloatingPointError(f"layer {layer}: inputs or outputs of the FFN are not finite")
                found[layer].append((total(p[0] for p in pairs), total(p[1] for p in pairs)))
    return found


@contextmanager
def swapped(model: PreTrainedModel, block: Block, affine: nn.Linear, length: int) -> Iterator[None]:
    """The model with the block's output replaced by `affine` of its input; gradients reach `affine`."""
    held: dict[str, Tensor] = {}

    def enter(_module: Any, args: Any) -> None:
        held["x"] = args[0]

    def leave(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return affine(held["x"].to(affine.weight.dtype)).to(output.dtype).reshape(output.shape)

    hooks = [
        model.get_submodule(block.enters).register_forward_pre_hook(enter),
        model.get_submodule(block.leaves).register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def affine_module(fit: Tensor) -> nn.Linear:
    """A module of [W; b] (d + 1, d)."""
    module = nn.Linear(fit.shape[0] - 1, fit.shape[1])
    module.weight.data, module.bias.data = fit[:-1].T.float().contiguous(), fit[-1].float().clone()
    return module


def train_affine(x: Tensor, y: Tensor, steps: int, every: int, rate: float, seed: int) -> list[tuple[int, Tensor]]:
    """[(step, [W; b] (d + 1, d))] of a linear map trained by Adam on batches of 256 rows of x, y (tokens, d) from PyTorch's
    default initialisation, as the paper's trained baseline."""
    torch.manual_seed(seed)
    module = nn.Linear(x.shape[1], y.shape[1])
    optimizer, found = torch.optim.Adam(module.parameters(), lr=rate), []
    for step in range(steps + 1):
        if step % every == 0:
            found.append((step, torch.cat([module.weight.detach().T, module.bias.detach()[None]]).double()))
        rows = torch.randint(len(x), (256,))
        loss = nn.functional.mse_loss(module(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def bilinear_gain(parts: list[tuple[Tensor, Tensor]], fit: Tensor, rank: int, steps: int, seed: int) -> float:
    """Increase of the feature-wise R^2 by adding exp(s) * A [(U x) o (V x)] of a given rank to the frozen least squares [W; b],
    on the third of three parts (x, y): trained on the first, with early stopping on the second (the paper uses the test part for
    early stopping, which is biased)."""
    torch.manual_seed(seed)
    rows = [(x, y - (x.double() @ fit[:-1] + fit[-1]).float()) for x, y in parts]
    d, m = parts[0][0].shape[1], parts[0][1].shape[1]
    scale = rows[0][0].std(0).clamp(min=1e-6)
    u, v = (nn.Parameter(torch.randn(d, rank) / d**0.5 / scale[:, None]) for _ in range(2))
    a, s = nn.Parameter(torch.randn(rank, m) / rank**0.5), nn.Parameter(torch.full((m,), -2.0))
    optimizer = torch.optim.Adam([u, v, a, s], lr=1e-3)

    def left(x: Tensor, r: Tensor) -> Tensor:
        return (r - s.exp() * (((x @ u) * (x @ v)) @ a)).square().mean()

    best, tested = float("inf"), 0.0
    spread = (parts[2][1].double() - parts[2][1].double().mean(0)).square().mean()
    for step in range(steps + 1):
        if step % 200 == 0:
            with torch.no_grad():
                if (now := float(left(*rows[1]))) < best:
                    best, tested = now, float(left(*rows[2]).double())
        batch = torch.randint(len(rows[0][0]), (256,))
        loss = left(rows[0][0][batch], rows[0][1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((rows[2][1].double().square().mean() - tested) / spread)
