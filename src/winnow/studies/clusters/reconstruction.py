"""Errors of per-cluster SVD compared with a global one: at equal total rank, at equal stored numbers, and by the rule of the
cluster paper's script, in which clusters have more rank. All errors are exact, from singular values in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from winnow.studies.clusters.found import Outlying


@dataclass(frozen=True)
class Blocks:
    """The clusters of a matrix (m, n): shape and descending squared singular values of each."""

    shapes: list[tuple[int, int]]
    energies: list[Tensor]

    @property
    def energy(self) -> float:
        return float(sum(float(e.sum()) for e in self.energies))

    def lost(self, ranks: list[float]) -> float:
        """The squared error with these ranks, as a share of the squared norm; fractional ranks include a part of a direction."""
        left = 0.0
        for energy, rank in zip(self.energies, ranks, strict=True):
            whole = min(int(rank), len(energy))
            left += float(energy[whole:].sum())
            if whole < len(energy):
                left -= (rank - whole) * float(energy[whole])
        return max(left, 0.0) / self.energy

    def stored(self, ranks: list[float]) -> float:
        """Stored numbers of two factors per cluster, or of the dense block if it is smaller."""
        return sum(min(k * (m + n), m * n) for k, (m, n) in zip(ranks, self.shapes, strict=True))

    def as_stored(self, ranks: list[float]) -> list[float]:
        """The ranks; full rank if the dense block is stored."""
        pairs = zip(ranks, self.shapes, strict=True)
        return [float(min(m, n)) if k * (m + n) >= m * n else k for k, (m, n) in pairs]


def cluster_blocks(weight: Tensor, labels: Tensor | None = None, rows: bool = False) -> Blocks:
    """The clusters of the columns (or rows) of W (m, n) by `labels`; without labels W is one cluster."""
    if labels is None:
        parts = [weight]
    else:
        found = [labels == label for label in labels.unique()]
        parts = [weight[chosen] if rows else weight[:, chosen] for chosen in found]
    return Blocks([(p.shape[0], p.shape[1]) for p in parts], [torch.linalg.svdvals(p).square() for p in parts])


def ranks_of(blocks: Blocks, k: int) -> list[float]:
    """k_c = ceil(k n_c / n), at most the rank of the cluster."""
    whole = sum(n for _, n in blocks.shapes)
    return [float(min(-(-k * n // whole), m, n)) for m, n in blocks.shapes]


def gains(clustered: Blocks, one: Blocks, k: int) -> dict[str, float] | None:
    """Reduction in % of the relative error by clusters of columns with total rank k, compared with one SVD (`one`) of: the same
    total rank; the same stored numbers, including one index per column; and the same numbers without the redundant ones of the
    SVD's factors (gauge-fixed, k (m + n - k)). None if the SVD of that size is exact."""
    (m, n), ranks = one.shapes[0], ranks_of(clustered, k)
    numbers = clustered.stored(ranks) + n
    discriminant = (m + n) ** 2 - 4 * numbers
    lost, kept = clustered.lost(ranks), clustered.lost(clustered.as_stored(ranks))
    compared = {
        "equal_rank": (lost, sum(ranks)),
        "equal_bytes": (kept, numbers / (m + n)),
        "gauge_fixed": (kept, ((m + n) - discriminant**0.5) / 2 if discriminant > 0 else float(min(m, n))),
    }
    found = {"stored": numbers / (m * n), "error": lost**0.5}
    for name, (own, size) in compared.items():
        other = one.lost([size]) if size < min(m, n) else 0.0
        if other <= 1e-20:
            return None
        found[name] = 100 * (1 - (own / other) ** 0.5)
    found["excess"] = one.lost([sum(ranks)]) - lost  # squared error of the one SVD above that of the clusters, at equal rank
    return found


def published_comparison(one: list[Blocks], many: list[Blocks], fraction: float) -> dict[str, float]:
    """The comparison of the cluster paper's script, for an FFN [(gate,) up, down], each as one block and in the same clusters of
    the d_model axis (columns, and rows of down): clusters of rank int(hidden / clusters x fraction) against one SVD of rank int(d
    x fraction), or int(hidden x fraction) for down. Errors are means over the matrices; `gain` in %.

    `rank_ratio`: total rank of the clusters divided by that of the SVD in the first matrix; `stored`: numbers in the clusters'
    factors as a share of dense."""
    (d, hidden), count = one[-1].shapes[0], len(many[0].shapes)
    errors: dict[str, list[float]] = {"global": [], "cluster": []}
    stored, dense, ratios = 0.0, 0.0, []
    for whole, blocks in zip(one, many, strict=True):
        (m, n), width = whole.shapes[0], hidden if whole is one[-1] else d
        size = float(min(int(width * fraction), m, n))
        ranks = [float(min(int(hidden / count * fraction), *shape)) for shape in blocks.shapes]
        errors["global"].append(whole.lost([size]) ** 0.5)
        errors["cluster"].append(blocks.lost(ranks) ** 0.5)
        stored += sum(k * (rows + columns) for k, (rows, columns) in zip(ranks, blocks.shapes, strict=True))
        dense += m * n
        ratios.append(sum(ranks) / size)
    mean = {name: sum(values) / len(values) for name, values in errors.items()}
    gain = 100 * (1 - mean["cluster"] / mean["global"]) if mean["global"] > 0 else 0.0
    return {**mean, "gain": gain, "rank_ratio": ratios[0], "stored": stored / dense}


def norm_bins(weight: Tensor, count: int) -> Tensor:
    """(n,): bins of the columns of W (m, n), `count` equal ones by descending norm."""
    labels = torch.empty(weight.shape[1], dtype=torch.int64)
    for label, part in enumerate(weight.norm(dim=0).argsort(descending=True, stable=True).tensor_split(count)):
        labels[part] = label
    return labels


def structureless(kind: str, d: int, hidden: int, seed: int = 0) -> list[Tensor]:
    """Unstructured [gate, up (hidden, d), down (d, hidden)]: `noise` has independent normal entries, `flat` equal singular
    values."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(hidden, d, generator=generator, dtype=torch.float64) for _ in range(3)]
    if kind == "flat":
        found = [torch.linalg.qr(w).Q for w in found]
    return [*found[:2], found[2].T.contiguous()]


def outlying(values: Tensor, sigmas: float = 5.0, top: int = 5) -> Outlying:
    """Statistics of column scores (n,): number of scores more than `sigmas` standard deviations above the mean, share of the sum
    in the `top` largest relative to equal scores, and largest divided by median."""
    largest = values.sort(descending=True).values[:top].sum()
    return {
        "massive": float((values > values.mean() + sigmas * values.std()).sum()),
        "top_share": float(largest / values.sum()) * len(values) / min(top, len(values)),
        "largest": float(values.max() / values.median().clamp(min=1e-300)),
    }
