"""The effect of training on the linearity of FFN blocks: R2_lin of the same architecture with initial weights, on the same
windows.

The linearity of a random FFN depends on the size of its inputs and weights (activations are nearly linear for small ones), so a
second untrained model has matrices with the norms of the trained ones, and the trained vectors: it only differs in the directions
of the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from winnow.io.progress import every

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedModel

    from winnow.studies.linearity.found import Key, Linear, Untrained
    from winnow.studies.linearity.recoverability import Block

SEEDS = (0, 1, 2)
TRAINED, FRESH, RESIZED = "trained", "untrained", "untrained, trained norms"
KEYS: tuple[Key, ...] = ("scalar", "feature")  # definitions of R^2, as in `recoverability.r2_scores`


def untrained(directory: Path | str, dtype: str, device: str, seed: int) -> PreTrainedModel:
    """The model of a directory's config with the initialisation of transformers, on the CPU with a seed; the state of PyTorch's
    generator is preserved. Raises InputError as `read_config` and `model_class` do."""
    import torch

    from winnow.models.classes import model_class, read_config
    from winnow.models.experts import unfuse

    config = read_config(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = unfuse(model_class(config)._from_config(config, dtype=getattr(torch, dtype)))
    return model.to(device).eval()


def sizes_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """{name: Frobenius norm () of a matrix, float64, or a vector itself} of every parameter, on the CPU."""
    import torch

    def size(p: Tensor) -> Tensor:
        return torch.linalg.vector_norm(p, dtype=torch.float64) if p.dim() > 1 else p.clone()

    return {name: size(p.detach()).cpu() for name, p in model.named_parameters()}


def resize(model: PreTrainedModel, sizes: dict[str, Tensor]) -> None:
    """Scale every matrix of the model to its norm in `sizes`, and copy the vectors. A zero matrix is left unchanged. Raises
    ValueError if `sizes` are from a model with other parameters."""
    import torch

    own = dict(model.named_parameters())
    if other := sorted(own.keys() ^ sizes.keys()):
        raise ValueError(f"sizes are from another model: {other[0]}")
    with torch.no_grad():
        for name, p in own.items():
            if p.dim() > 1:
                norm = torch.linalg.vector_norm(p, dtype=torch.float64).item()
                p.mul_(sizes[name].item() / norm if norm else 1.0)
            else:
                p.copy_(sizes[name])


def untrained_blocks(
    directory: Path | str,
    sizes: dict[str, Tensor],
    blocks: list[Block],
    windows: Tensor,
    folds: int,
    dtype: str,
    device: str,
    once: Callable[[str, Callable[[], list[Untrained]]], list[Untrained]] = lambda _, make: make(),
) -> list[Untrained]:
    """R^2 of every block on the last fold of windows (count, length), fitted on the others, for untrained models by seed: as
    initialised, and with the `sizes` of the trained model. `once` keeps what is known of each. Raises FloatingPointError as
    `collect_sums` does."""
    from winnow.studies.linearity.recoverability import collect_sums, least_squares, r2_scores, total

    batch = max(1, 4096 // windows.shape[1])

    def scores(seed: int, weights: str) -> list[Untrained]:
        model = untrained(directory, dtype, device, seed)
        found: list[Untrained] = []
        if weights == RESIZED:
            resize(model, sizes)
        for layer, parts in collect_sums(model, blocks, windows, folds, batch).items():
            *train, test = (whole for whole, _ in parts)
            r2 = r2_scores(least_squares(total(train)), test)
            found.append({"weights": weights, "seed": seed, "layer": layer, "scalar": r2["scalar"], "feature": r2["feature"]})
        return found

    pairs = list(product(SEEDS, (FRESH, RESIZED)))
    return [row for pair in every(pairs, "untrained models") for row in once(f"untrained {pair}", partial(scores, *pair))]


def profiles(found: Linear, key: Key) -> dict[str, list[list[float]]]:
    """{weights: R^2 by one definition of every block, in order of the layers, for every model with these weights}."""
    blocks = sorted(found["blocks"], key=lambda row: row["layer"])
    shown = {TRAINED: [[row[key] for row in blocks]]}
    for weights in (FRESH, RESIZED):
        by_seed: dict[int, dict[int, float]] = {}
        for row in found["learned"]:
            if row["weights"] == weights:
                by_seed.setdefault(row["seed"], {})[row["layer"]] = row[key]
        shown[weights] = [[own[row["layer"]] for row in blocks] for own in by_seed.values()]
    return shown


def means(models: list[list[float]]) -> list[float]:
    """Means over models for every block."""
    return [sum(values) / len(values) for values in zip(*models, strict=True)]


def change(found: Linear, weights: str, key: Key) -> tuple[float, float]:
    """(mean over blocks of trained minus untrained R^2, its standard error; NaN for a single block).

    Differences are paired by block. Blocks and seeds are both samples: the squared errors over blocks (of differences to the mean
    over seeds) and over seeds (of means over blocks) are added."""
    from winnow.evaluation.spread import over_seeds

    shown = profiles(found, key)
    (trained,), models = shown[TRAINED], shown[weights]
    apart = [[one - other for one, other in zip(trained, model, strict=True)] for model in models]
    by_block, by_seed = means(apart), [sum(row) / len(row) for row in apart]
    return sum(by_block) / len(by_block), math.hypot(over_seeds(by_block), over_seeds(by_seed))


def rank_correlation(one: list[float], other: list[float]) -> float:
    """The rank correlation; NaN if one side is constant."""
    import pandas as pd

    return float(pd.Series(one).rank().corr(pd.Series(other).rank()))


def correlation(found: Linear, weights: str, key: Key) -> float:
    """Spearman's correlation over blocks of the trained R^2 and the untrained mean over seeds; NaN for a single block."""
    shown = profiles(found, key)
    return rank_correlation(shown[TRAINED][0], means(shown[weights]))


def change_rows(found: Linear) -> list[dict[str, Any]]:
    """`change` and `correlation` against both kinds of untrained weights, by both definitions of R^2."""
    rows = []
    for weights in (FRESH, RESIZED):
        for key in KEYS:
            mean, error = change(found, weights, key)
            row = {"against": weights, "definition": key, "r2_change": mean, "r2_change_se": error}
            rows.append({**row, "spearman": correlation(found, weights, key)})
    return rows


def learned_rows(found: Linear) -> list[dict[str, Any]]:
    """A row per block and kind of weights: the mean over `models` of R^2 by both definitions, with its standard error."""
    from winnow.evaluation.spread import over_seeds

    layers, rows = sorted(row["layer"] for row in found["blocks"]), []
    by_key = {key: profiles(found, key) for key in KEYS}
    for weights in (TRAINED, FRESH, RESIZED):
        for i, layer in enumerate(layers):
            row = {"layer": layer, "weights": weights, "models": len(by_key[KEYS[0]][weights])}
            for key, shown in by_key.items():
                values = [model[i] for model in shown[weights]]
                row |= {key: sum(values) / len(values), f"{key}_se": over_seeds(values)}
            rows.append(row)
    return rows


def learned_figure(learned: pd.DataFrame) -> Any:
    """Profiles over layers; a panel per model, a line per kind of weights."""
    from winnow.reporting.figures import axes_grid, line_style, shared_legend

    models = list(learned["model"].unique()) if len(learned) else []
    figure, axes = axes_grid(len(models))
    for axis, model in zip(axes, models, strict=True):
        own = learned[learned["model"] == model]
        for i, (weights, rows) in enumerate(own.groupby("weights", sort=False)):
            rows = rows.sort_values("layer")
            axis.errorbar(
                rows["layer"], rows["scalar"], yerr=2 * rows["scalar_se"].fillna(0), label=weights,
                markersize=4, linewidth=1.2, capsize=2, **line_style(i),
            )  # fmt: skip
        axis.set_ylim(top=1)
        axis.set_title(f"{model}: held-out R² of the affine map", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylabel("R² (variance about the grand mean)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    shared_legend(figure, axes, f"bars: 2 standard errors, {len(SEEDS)} seeds")
    return figure
