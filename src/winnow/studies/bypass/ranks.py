"""Effective ranks of every matrix by four definitions, in the metric of the weights and in that of the outputs; and whether their
profile over layers has the shape of an hourglass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.factors.spectra import effective_ranks
from winnow.io.progress import every
from winnow.models.architectures import moments_file

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.io.artifacts import Bundle
    from winnow.models.architectures import Matrix
    from winnow.models.files import ModelFiles
    from winnow.studies.bypass.found import EffectiveRanks, Hourglass, Parts

DEFINITIONS = {
    "k95": "directions with 95 % of the energy",  # HyperTensor Paper I
    "stable": "stable rank (energy over its largest part)",
    "entropy": "entropy rank (exp of the energy's)",  # Roy and Vetterli
    "rrr90": "rank for 90 % of the variance (RRR)",  # reduced-rank regression of outputs on inputs; of the weights: white inputs
}
METRICS = {"weights": "weights", "outputs": "outputs on the calibration tokens"}
EARLY, LATE, OF = 6, 5, 30  # layers 0-5 and 25-29 of the paper's 30
ORDERS = 2000  # number of random orders of layers, if there are too many to use all
ALL_ORDERS = 7  # largest number of layers for which all orders are used


def profile(
    files: ModelFiles,
    moments: Bundle,
    matrices: Sequence[Matrix] | None = None,
    once: Callable[[str, Callable[[], Any]], Any] = lambda _, make: make(),
) -> list[EffectiveRanks]:
    """One row per matrix and metric, without experts: the effective ranks as shares of the smaller side, `ambient`. `matrices`:
    all by default; `once` keeps what is known of each layer."""
    whole = [m for m in (files.matrices if matrices is None else matrices) if m.expert is None]
    layers = {layer: [m for m in whole if m.layer == layer] for layer in dict.fromkeys(m.layer for m in whole)}
    return [
        row
        for layer in every(list(layers), "layers")
        for row in once(f"ranks {layer}", partial(_ranks, files, moments, layers[layer]))
    ]


def _ranks(files: ModelFiles, moments: Bundle, matrices: Sequence[Matrix]) -> list[EffectiveRanks]:
    import torch

    rows: list[EffectiveRanks] = []
    for m in matrices:
        weight, site = files.weight(m), moments.tensors(moments_file(m.layer))
        gram, mean = site[f"{m.site}.gram"].double(), site[f"{m.site}.mean"].double()
        plain = torch.linalg.svdvals(weight)
        found = {"weights": (plain, plain)}
        found["outputs"] = (_values(weight, gram), _values(weight, gram - torch.outer(mean, mean)))
        for metric, (values, centred) in found.items():
            ambient, own = min(m.shape), effective_ranks(values.numpy())
            rows.append(
                {
                    "layer": m.layer,
                    "role": m.role,
                    "metric": metric,
                    "ambient": ambient,
                    "k95": own["k95"] / ambient,
                    "stable": own["stable_rank"] / ambient,
                    "entropy": own["entropy_rank"] / ambient,
                    "rrr90": effective_ranks(centred.numpy())["k90"] / ambient,
                }
            )
    return rows


def _values(weight: Tensor, gram: Tensor) -> Tensor:
    """Singular values of W C^{1/2}, largest first."""
    import torch

    from winnow.numerics.linalg import square_root

    return torch.linalg.svdvals(weight @ square_root(gram))


def ends(layers: int) -> tuple[int, int]:
    """The numbers of first and of last layers that correspond to the paper's 0-5 and 25-29 of 30."""
    return -(-EARLY * layers // OF), -(-LATE * layers // OF)


def hourglass(values: Sequence[float]) -> Parts:
    """Means over the early, middle and late layers; `excess`: the difference of the lower end to the middle in %; and `chance`:
    the share of orders of the layers with at least this excess. An hourglass has a positive excess.

    Raises ValueError if there are too few layers for a middle."""
    early, late = ends(len(values))
    if early + late >= len(values):
        raise ValueError(f"{len(values)} layers have no middle between the first {early} and the last {late}")
    own = np.asarray(values, dtype=np.float64)
    if len(own) <= ALL_ORDERS:
        orders = np.array(list(permutations(own)))
    else:
        generator = np.random.default_rng(0)
        orders = np.array([own, *(generator.permutation(own) for _ in range(ORDERS))])
    excess = _excess(own[None], early, late)[0]
    chance = float((_excess(orders, early, late) >= excess - 1e-9).mean())
    return {
        "early": float(own[:early].mean()),
        "middle": float(own[early:-late].mean()),
        "late": float(own[-late:].mean()),
        "excess": float(excess),
        "chance": chance,
    }


def _excess(orders: np.ndarray, early: int, late: int) -> np.ndarray:
    """(orders,) from (orders, layers)."""
    lower = np.minimum(orders[:, :early].mean(1), orders[:, -late:].mean(1))
    return 100 * (lower / orders[:, early:-late].mean(1) - 1)


def hourglasses(rows: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[Hourglass]:
    """One row per role (and `ffn`, the mean of all), metric and definition. Empty if there are too few layers."""
    layers = sorted({row["layer"] for row in rows if row["role"] in roles})
    if not layers or sum(ends(len(layers))) >= len(layers):
        return []
    found: list[Hourglass] = []
    named = {role: [role] for role in roles} | {"ffn": list(roles)}
    for name, own in named.items():
        for metric in METRICS:
            for definition in DEFINITIONS:
                chosen = [row for row in rows if row["role"] in own and row["metric"] == metric]
                by_layer = [float(np.mean([row[definition] for row in chosen if row["layer"] == layer])) for layer in layers]
                found.append({"role": name, "metric": metric, "definition": definition, **hourglass(by_layer)})
    return found
