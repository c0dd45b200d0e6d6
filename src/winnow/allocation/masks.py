"""Continuous sizes: masks over the singular directions of every matrix and a gate to its dense form, always with exactly the
budget's bytes.

A group has a cut c between 1 and its largest size, and a gate: the probability p that it stays dense. Direction i is kept with
probability q_i = sigmoid((c + 1/2 - i) / tau), which becomes truncation at size c as tau goes to 0. A quadratic loss scales with
a^2 if the missing part scales with a, so directions are multiplied by 1 - sqrt(1 - q_i), and the difference of a matrix to its
dense form by sqrt(1 - p): then the loss, like the bytes, is the mean over sampled cuts and gates, and fractional choices have no
advantage over discrete ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from winnow.allocation.base import stored_bytes
from winnow.allocation.groups import TOLERANCE, Group
from winnow.allocation.kinds.uniform import by_share

ENDS = 0.02  # smallest distance of initial parameters to their limits, where gradients vanish
SURE = 3.0  # initial log-odds of a gate
SPREAD = 40.0  # largest common shift of the log-odds
LEAST = 0.25  # smallest width of a cut, at which neighbouring sizes are distinguished


class Masked(nn.Module):
    """A frozen dense matrix and its factors: y = W x + lacking (left (mask * right x) + b - W x), with left (out, K), right (K,
    in) and mask (K,). Dense without a mask; if `lacking` is None, only the factors are computed."""

    def __init__(self, dense: nn.Module, left: Tensor, right: Tensor):
        super().__init__()
        self.dense = dense
        self.left, self.right = left, right
        self.mask: Tensor | None = None
        self.lacking: Tensor | None = None

    def put(self, mask: Tensor, lacking: Tensor, decided: bool) -> None:
        """Set both, and skip computations without effect: directions masked to 0, and, once gates are decided, the side that is
        not chosen."""
        self.mask, self.lacking = mask[: int(mask.count_nonzero())], lacking
        if decided:
            if lacking < 0.5:
                self.mask = None
            self.lacking = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return self.dense(x)
        inner = functional.linear(x, self.right[: len(self.mask)]) * self.mask
        low = functional.linear(inner, self.left[:, : len(self.mask)], self.dense.bias)  # type: ignore[arg-type]
        if self.lacking is None:
            return low
        dense = self.dense(x)
        return dense + self.lacking * (low - dense)


class Sizes:
    """Cuts and gates of groups from two vectors of log-odds, `cut` and `gate` (groups,), with a common shift such that the bytes
    are exactly `allowed`. Groups without a size smaller than dense stay dense. Initialised with `sizes`; the cut of a dense group
    is initialised with the overall share of bytes."""

    def __init__(self, groups: list[Group], sizes: dict[str, int | None], allowed: float, device: str = "cpu"):
        self.every, self.start, self.allowed = groups, sizes, allowed
        self.groups = [g for g in groups if g.largest]
        self.largest = torch.tensor([g.largest for g in self.groups], dtype=torch.float64, device=device)
        self.fixed = sum(g.dense for g in groups if not g.largest)
        rows = [[g.bytes(min(size, g.largest)) for size in range(int(self.largest.max()) + 1)] for g in self.groups]
        self.table = torch.tensor(rows, dtype=torch.float64, device=device)
        self.dense = torch.tensor([g.dense for g in self.groups], dtype=torch.float64, device=device)
        keep = allowed / sum(g.dense for g in groups)
        usual = by_share(self.groups, {g.name: keep for g in self.groups}, 0.0)
        own = [sizes[g.name] for g in self.groups]
        cut = [usual[g.name] if size is None else size for g, size in zip(self.groups, own, strict=True)]
        share = (torch.tensor(cut, dtype=torch.float64, device=device) - 1) / (self.largest - 1).clamp(min=1)
        self.cut = nn.Parameter(share.clamp(ENDS, 1 - ENDS).logit())
        odds = [SURE if size is None else -SURE for size in own]
        self.gate = nn.Parameter(torch.tensor(odds, dtype=torch.float64, device=device))

    def at(self, cut: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cuts (groups,), probabilities of staying dense (groups,), total bytes ()) from log-odds; bytes between two sizes are
        interpolated."""
        sizes = 1 + (self.largest - 1) * cut.sigmoid()
        dense = gate.sigmoid()
        below = sizes.detach().floor().clamp(max=self.largest - 1)
        low, high = (self.table.gather(1, index.long()[:, None])[:, 0] for index in (below, below + 1))
        stored = low + (sizes - below) * (high - low)
        return sizes, dense, self.fixed + (dense * self.dense + (1 - dense) * stored).sum()

    def spread(self) -> tuple[Tensor, Tensor]:
        """(cuts, probabilities of staying dense), differentiable, from the parameters shifted to the allowed bytes."""
        return self.shifted(self.cut, self.gate, torch.ones_like(self.gate))

    def shifted(self, cut: Tensor, gate: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The same for any log-odds, with gates shifted where `moved` is 1; by bisection, as bytes decrease with the shift. The
        gradient of the shift is that of an implicit function: -(d bytes / d log-odds) / (d bytes / d shift)."""
        with torch.no_grad():
            low, high = -SPREAD, SPREAD
            for _ in range(60):
                middle = (low + high) / 2
                over = self.at(cut - middle, gate - middle * moved)[2] > self.allowed
                low, high = (middle, high) if over else (low, middle)
        shift = torch.tensor(high, dtype=torch.float64, device=cut.device, requires_grad=True)
        with torch.enable_grad():
            slope = torch.autograd.grad(self.at(cut.detach() - shift, gate.detach() - shift * moved)[2], shift)[0]
        shift = shift.detach()
        stored = self.at(cut - shift, gate - shift * moved)[2]
        shift = shift - (stored - stored.detach()) / slope.clamp(max=-1e-9)
        sizes, dense, _ = self.at(cut - shift, gate - shift * moved)
        return sizes, dense

    def masks(self, share: float) -> tuple[list[Tensor], Tensor]:
        """(mask (K,) of every group, factor of each difference to dense (groups,)), differentiable, in float32. The width tau of
        a cut is a `share` of the largest size, at least LEAST."""
        sizes, dense = self.spread()
        tau = (share * self.largest).clamp(min=LEAST)
        numbers = torch.arange(1, self.table.shape[1], dtype=torch.float64, device=sizes.device)
        above = ((sizes[:, None] + 0.5 - numbers) / tau[:, None]).float()
        every = 1 - _root_of_rest(above)
        lacking = _root_of_rest(torch.logit(dense, eps=1e-12).float())
        return [row[: g.largest] for row, g in zip(every, self.groups, strict=True)], lacking

    @torch.no_grad()
    def decided(self) -> Tensor:
        """(groups,): log-odds of gates after the decision: dense if the probability is above a half, or more or fewer of the most
        probable groups if the bytes require it."""
        _, chances = self.spread()
        order = chances.argsort(descending=True, stable=True)
        count = int((chances > 0.5).sum())
        least, most = self.table[:, 1], self.table.gather(1, self.largest.long()[:, None])[:, 0]

        def bytes_with(count: int, others: Tensor) -> float:
            return self.fixed + float(self.dense[order[:count]].sum() + others[order[count:]].sum())

        while count and bytes_with(count, least) > self.allowed:
            count -= 1
        while count < len(order) and bytes_with(count, most) < self.allowed and bytes_with(count + 1, least) <= self.allowed:
            count += 1
        return torch.full_like(self.gate, -2 * SPREAD).index_fill(0, order[:count], 2 * SPREAD)

    @torch.no_grad()
    def rounded(self) -> dict[str, int | None]:
        """Sizes for every group, or dense by the decided gates; from the cuts, shifted to the remaining bytes. The initial sizes
        if these miss the bytes."""
        gates = self.decided()
        cuts, _ = self.shifted(self.cut, gates, torch.zeros_like(gates))
        cut = [(g, size) for g, size, gate in zip(self.groups, cuts.tolist(), gates.tolist(), strict=True) if gate < 0]
        left = self.allowed - self.fixed - float(self.dense[gates > 0].sum())
        found: dict[str, int | None] = {g.name: None for g in self.every}
        if cut:
            shares = {g.name: bytes_at(g, size) / g.dense for g, size in cut}
            found |= by_share([g for g, _ in cut], shares, left / sum(g.dense for g, _ in cut))
        whole = sum(g.dense for g in self.every)
        return found if 0 <= self.allowed - stored_bytes(self.every, found) <= TOLERANCE * whole else self.start


def bytes_at(g: Group, size: float) -> float:
    """Bytes of a group at a fractional size."""
    below = min(int(size), g.largest - 1)
    return g.bytes(below) + (size - below) * (g.bytes(below + 1) - g.bytes(below))


def _root_of_rest(odds: Tensor) -> Tensor:
    """sqrt(1 - sigmoid(odds)), with a finite derivative everywhere."""
    return (functional.logsigmoid(-odds) / 2).exp()
