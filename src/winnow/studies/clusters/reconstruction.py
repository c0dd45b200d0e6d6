"""Errors of per-cluster SVD against a global one: at equal total rank, at equal stored numbers, and by the rule that the cluster
paper's script used, which gives its clusters more rank. All errors are exact, from singular values in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The clusters of a matrix (m, n): of each, its shape and its squared singular values, the largest first."""

    shapes: list[tuple[int, int]]
    energies: list[Tensor]

    @property
    def energy(self) -> float:
        return float(sum(float(e.sum()) for e in self.energies))

    def lost(self, ranks: list[float]) -> float:
        """The squared error with these ranks, as a share of the squared norm; a part of a rank takes its part of a direction."""
        left = 0.0
        for energy, rank in zip(self.energies, ranks, strict=True):
            whole = min(int(rank), len(energy))
            left += float(energy[whole:].sum())
            if whole < len(energy):
                left -= (rank - whole) * float(energy[whole])
        return max(left, 0.0) / self.energy

    def stored(self, ranks: list[float]) -> float:
        """Numbers of two factors per cluster, or of the dense block where that is less."""
        return sum(min(k * (m + n), m * n) for k, (m, n) in zip(ranks, self.shapes, strict=True))

    def as_stored(self, ranks: list[float]) -> list[float]:
        """The ranks, full where the dense block is stored."""
        pairs = zip(ranks, self.shapes, strict=True)
        return [float(min(m, n)) if k * (m + n) >= m * n else k for k, (m, n) in pairs]


def blocks_of(weight: Tensor, labels: Tensor | None = None, rows: bool = False) -> Blocks:
    """The clusters of the columns (or rows) of W (m, n) by `labels`; without labels W is one cluster."""
    if labels is None:
        parts = [weight]
    else:
        found = [labels == label for label in labels.unique()]
        parts = [weight[chosen] if rows else weight[:, chosen] for chosen in found]
    return Blocks([(p.shape[0], p.shape[1]) for p in parts], [torch.linalg.svdvals(p).square() for p in parts])


def ranks_of(blocks: Blocks, k: int) -> list[float]:
    """k_c = ceil(k n_c / n), and no more than the cluster has."""
    whole = sum(n for _, n in blocks.shapes)
    return [float(min(-(-k * n // whole), m, n)) for m, n in blocks.shapes]


def gains(clustered: Blocks, one: Blocks, k: int) -> dict[str, float] | None:
    """How much lower the relative error of clusters of columns with total rank k is than that of one SVD (`one`), in %: given
    the same total rank; the same stored numbers, one index a column included; and the same numbers without those of the one
    SVD's factors that are redundant (gauge-fixed, k (m + n - k)). None where the one SVD of that size is exact."""
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


def published(one: list[Blocks], many: list[Blocks], fraction: float) -> dict[str, float]:
    """The cluster paper's comparison as its script makes it, for an FFN [(gate,) up, down], each as one block and in the same
    clusters of the d_model axis (columns, and rows of down): every cluster has rank int(hidden / clusters x fraction), against
    one SVD of rank int(d x fraction) for all but down, whose rank is int(hidden x fraction). Errors are means over the matrices;
    `gain` in %.

    `rank_ratio` is the total rank of the clusters over that of the one SVD in the first matrix, `stored` what the clusters'
    factors store over dense."""
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
    """(n,): the columns of W (m, n) in `count` equal bins by their norm, the largest first."""
    labels = torch.empty(weight.shape[1], dtype=torch.int64)
    for label, part in enumerate(weight.norm(dim=0).argsort(descending=True, stable=True).tensor_split(count)):
        labels[part] = label
    return labels


def structureless(kind: str, d: int, hidden: int, seed: int = 0) -> list[Tensor]:
    """[gate, up (hidden, d), down (d, hidden)] without any structure: `noise` has independent normal entries, `flat` all
    singular values equal."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(hidden, d, generator=generator, dtype=torch.float64) for _ in range(3)]
    if kind == "flat":
        found = [torch.linalg.qr(w).Q for w in found]
    return [*found[:2], found[2].T.contiguous()]


def outlying(values: Tensor, sigmas: float = 5.0, top: int = 5) -> dict[str, float]:
    """Of column scores (n,): how many lie more than `sigmas` standard deviations above the mean, the share of the sum that the
    `top` largest hold over the share that they would hold if all were equal, and the largest over the median."""
    largest = values.sort(descending=True).values[:top].sum()
    return {
        "massive": float((values > values.mean() + sigmas * values.std()).sum()),
        "top_share": float(largest / values.sum()) * len(values) / min(top, len(values)),
        "largest": float(values.max() / values.median().clamp(min=1e-300)),
    }
