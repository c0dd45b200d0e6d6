"""The loss that every size of every group is predicted to cost: the quadratic model of the loss around the dense model.

A change D of a matrix moves its output by D x, and the loss by 1/2 E[(g^T D x)^2] with g the loss's gradient in the output: the
Fisher information as its Hessian. With x and g taken as independent this is 1/2 tr(F D C D^T), C = E[x x^T], F = E[g g^T] (KFAC,
arXiv 1503.05671). A structure that replaces a whole FFN changes its output instead: there D x is that change, and F the moment
of the gradient in the FFN's output. Changes of several matrices are taken to add up, which holds as long as each is small.

What no calibration token shows would cost nothing: hidden units that never fired could go for free, and some fire on other text.
So one token more is counted, of which nothing is known, see `unseen`.

By the tokens that it was made on, a fit loses less than on others. Where tokens are few for the channels of an input or an output
(`winnow.calibration.few_tokens`), C and F are therefore what `winnow.factors.shrinkage` expects of other text; elsewhere they are
as they were seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pandas as pd
from torch import Tensor

from winnow.calibration.reader import Layers, Statistics
from winnow.errors import InputError
from winnow.factors.shrinkage import expected, expected_jointly
from winnow.io.artifacts import Bundle
from winnow.models.architectures import GRADIENTS, group_name, reads
from winnow.models.files import ModelFiles
from winnow.structures.base import Problem, Structure

log = logging.getLogger(__name__)


def predict(
    files: ModelFiles, moments: Layers, gradients: Layers, factors: dict[str, Bundle], structure: Structure, device: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield (group name, predicted increase of the loss (sizes + 1,), nats per token) for every group that `factors` has a fit of
    (by name); size 0 is what is stored at every size, for low rank the matrix removed.

    Experts of a mixture are left out, as they have no gradients. Raises InputError, naming the matrix, for a statistic that is
    not finite.
    """
    inputs, outputs = Statistics(moments, device), Statistics(gradients, device)
    needs = dict.fromkeys(("gram", "count", "max_abs", *(need for need in structure.needs() if need not in GRADIENTS)))
    for group in structure.groups(files.matrices):
        name = group_name(group)
        if group[0].expert is not None or name not in factors:
            continue
        inputs.keep(group)
        outputs.keep(group)
        sites = {m.name: inputs.of(m, m.site, [need for need in needs if reads(m, need)]) for m in group}
        tokens = {name: int(site["count"]) for name, site in sites.items()}
        gradients_of = {m.name: outputs.of(m, m.role, ["gradient_gram"])["gradient_gram"] for m in structure.judged(group)}
        try:
            problem = Problem(
                group,
                {m.name: files.weight(m, device) for m in group},
                {name: unseen(site) for name, site in on_other_text(sites).items()},
                None,
                inputs.precision,
                {m.name: files.tensor(f"{m.module}.bias").double().to(device) for m in group if m.bias},
                {name: {"gradient_gram": expected(moment, tokens[name])} for name, moment in gradients_of.items()},
            )
        except FloatingPointError as error:
            raise InputError(f"{group[0].module}: {error}") from error
        fit = {key: value.to(device) for key, value in factors[name].tensors(f"{name}.safetensors").items()}
        predicted = structure.predicted(problem, fit)[: len(fit["numbers"])].cpu()
        log.info("%s: %.3g nats per token at size 0, %.3g at the largest", name, float(predicted[0]), float(predicted[-1]))
        yield name, predicted


def on_other_text(sites: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Statistics of the inputs of a group by matrix, with the second moments that are expected of other text."""
    *inner, last = sites
    if "cross" not in sites[last]:
        return {name: site | {"gram": expected(site["gram"], int(site["count"]))} for name, site in sites.items()}
    x, h = expected_jointly(sites[inner[-1]], sites[last], int(sites[last]["count"]))
    return dict.fromkeys(inner, x) | {last: h}


def unseen(site: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of a site with its gram (n, n) as after one token more than its `count`, whose channels are independent, each
    with the energy of what channels typically reach at most: the median of the squares of `max_abs` (n,) that are not 0."""
    count, reached = float(site["count"]), site["max_abs"].square()
    gram = site["gram"] * (count / (count + 1))
    if (reached > 0).any():
        gram.diagonal().add_(reached[reached > 0].median() / (count + 1))
    return site | {"gram": gram}


def table_of(predicted: dict[str, list[float]]) -> pd.DataFrame:
    """Rows of predicted.parquet: group, predicted (nats per token by size)."""
    return pd.DataFrame([{"group": n, "predicted": losses} for n, losses in predicted.items()], columns=["group", "predicted"])
