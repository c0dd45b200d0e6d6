"""Assignments of channels to clusters, for structures that store clusters separately.

A channel is a column of W (its input) or a row (its output). `neurons` and `d_model` name an axis of the model: the neurons of an
FFN (or head channels of attention) are rows of gate, up, q, k, v and columns of down and o.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from winnow.errors import InputError
from winnow.models.architectures import Matrix, moments_file

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles

WRITERS = ("o_proj", "down_proj")  # roles whose outputs are on the d_model axis
PROFILE = ("rms", "mean_abs", "max_abs", "active", "mean")


class Clustering(BaseModel):
    """How channels are clustered."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    clusters: int = Field(4, ge=1, description="number of clusters")
    axis: Literal["columns", "rows", "d_model", "neurons"] = Field(
        "columns", description="columns or rows of every matrix; or the d_model axis or the neurons, be it rows or columns"
    )
    by: Literal["norm", "cosine", "activation", "co_activation", "random"] = Field(
        "norm",
        description="norm: equal bins of channels ordered by L2 norm; cosine: k-means on normalised channels; activation: "
        "k-means on activation statistics; co_activation: k-means on correlations; random: equal bins",
    )
    seed: int = Field(0, ge=0, description="seed of k-means and of random bins")

    def on_rows(self, matrix: Matrix) -> bool:
        """Whether the clustered channels are rows of W."""
        if self.axis in ("rows", "columns"):
            return self.axis == "rows"
        return (self.axis == "d_model") == (matrix.role in WRITERS)

    def needs(self) -> tuple[str, ...]:
        """Statistics of the clustered channels."""
        return {"activation": PROFILE, "co_activation": ("gram", "mean")}.get(self.by, ())


def site_of(clustering: Clustering, matrix: Matrix) -> str | None:
    """The site whose channels are clustered; None for rows without a recorded site."""
    if not clustering.on_rows(matrix):
        return matrix.site
    return matrix.beside("ffn_hidden") if matrix.role in ("gate_proj", "up_proj") else None  # their rows are the neurons


def assign(weight: Tensor, site: dict[str, Tensor], clustering: Clustering, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """(labels (channels,) int64, distance (channels,) to the cluster's centre) of the channels of W (out, in).

    `site` has the statistics `clustering.needs()` of these channels. The centre of a bin is the mean score of its channels.
    Raises ValueError if there are fewer distinct channels than clusters.
    """
    import torch

    if not all(torch.isfinite(value).all() for value in (weight, *site.values())):
        raise ValueError("the weights or statistics to cluster are not finite")
    channels = weight if clustering.on_rows(matrix) else weight.T
    if len(channels) < clustering.clusters:
        raise ValueError(f"{len(channels)} channels cannot form {clustering.clusters} clusters")
    return _WAYS[clustering.by](channels, site, clustering)


def _bins(score: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Equal bins of the channels by descending score; ties by position."""
    import torch

    order = score.argsort(descending=True, stable=True)
    labels = torch.empty(len(score), dtype=torch.int64)
    for label, part in enumerate(order.tensor_split(clusters)):
        labels[part.cpu()] = label
    score = score.cpu()
    centres = torch.stack([score[labels == c].mean() for c in range(clusters)])
    return labels, (score - centres[labels]).abs()


def _norm(channels: Tensor, site: dict[str, Tensor], clustering: Clustering) -> tuple[Tensor, Tensor]:
    return _bins(channels.norm(dim=1), clustering.clusters)


def _random(channels: Tensor, site: dict[str, Tensor], clustering: Clustering) -> tuple[Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(clustering.seed)
    return _bins(torch.randperm(len(channels), generator=generator).double(), clustering.clusters)


def _cosine(channels: Tensor, site: dict[str, Tensor], clustering: Clustering) -> tuple[Tensor, Tensor]:
    return _k_means(channels / channels.norm(dim=1, keepdim=True).clamp(min=1e-300), clustering)


def _activation(channels: Tensor, site: dict[str, Tensor], clustering: Clustering) -> tuple[Tensor, Tensor]:
    import torch

    sizes = torch.stack([site[name].clamp(min=1e-12).log() for name in ("rms", "mean_abs", "max_abs")], dim=1)
    shape = torch.stack([site["active"], site["mean"] / site["rms"].clamp(min=1e-12)], dim=1)
    profile = torch.cat([sizes, shape], dim=1)
    spread = profile.std(0)
    return _k_means((profile - profile.mean(0)) / torch.where(spread > 0, spread, 1.0), clustering)


def _co_activation(channels: Tensor, site: dict[str, Tensor], clustering: Clustering) -> tuple[Tensor, Tensor]:
    import torch

    covariance = site["gram"] - torch.outer(site["mean"], site["mean"])
    spread = covariance.diagonal().clamp(min=0).sqrt()
    correlation = covariance / torch.outer(spread, spread).clamp(min=1e-300)
    return _k_means(torch.where((spread[:, None] * spread) > 0, correlation, 0.0).abs(), clustering)


_WAYS: dict[str, Callable[[Tensor, dict[str, Tensor], Clustering], tuple[Tensor, Tensor]]] = {
    "norm": _norm,
    "cosine": _cosine,
    "activation": _activation,
    "co_activation": _co_activation,
    "random": _random,
}


def _k_means(points: Tensor, clustering: Clustering) -> tuple[Tensor, Tensor]:
    """k-means++ with 5 starts (as in the cluster paper's script); clusters are numbered from the largest to the smallest."""
    import warnings

    import numpy as np
    import torch
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # too few distinct points: an error below
        found = KMeans(clustering.clusters, n_init=5, max_iter=100, random_state=clustering.seed).fit(points.cpu().numpy())
    counts = np.bincount(found.labels_, minlength=clustering.clusters)
    if (counts == 0).any():
        raise ValueError(f"only {(counts > 0).sum()} distinct clusters by {clustering.by}, {clustering.clusters} are requested")
    rank = np.empty(clustering.clusters, dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(clustering.clusters)
    distance = np.linalg.norm(points.cpu().numpy() - found.cluster_centers_[found.labels_], axis=1)
    return torch.from_numpy(rank[found.labels_]), torch.from_numpy(distance)


def cluster_rows(labels: Tensor, distance: Tensor, clustering: Clustering, matrix: Matrix) -> dict[str, Any]:
    """Columns of clusters.parquet for one matrix, one row per channel."""
    count = len(labels)
    return {
        "layer": [matrix.layer] * count,
        "role": [matrix.part] * count,
        "axis": ["rows" if clustering.on_rows(matrix) else "columns"] * count,
        "channel": list(range(count)),
        "cluster": labels.tolist(),
        "distance": distance.tolist(),
    }


def assign_all(files: ModelFiles, moments: Bundle | None, clustering: Clustering) -> Iterator[dict[str, Any]]:
    """Columns of clusters.parquet, matrix by matrix. If the clustering needs statistics, matrices without statistics of the
    clustered channels are skipped: columns have them, rows only in the FFN. Raises InputError naming the matrix."""
    layers: dict[int, dict[str, Tensor]] = {}
    for matrix in files.matrices:
        site: dict[str, Tensor] = {}
        if clustering.needs():
            where = site_of(clustering, matrix)
            if where is None:
                continue
            assert moments is not None
            if matrix.layer not in layers:
                layers = {matrix.layer: moments.tensors(moments_file(matrix.layer))}
            site = {need: layers[matrix.layer][f"{where}.{need}"].double() for need in clustering.needs()}
        try:
            labels, distance = assign(files.weight(matrix), site, clustering, matrix)
        except ValueError as error:
            raise InputError(f"{matrix.module}: {error}") from error
        yield cluster_rows(labels, distance, clustering, matrix)
