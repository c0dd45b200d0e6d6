"""Predicted increase of the loss at every size of every group: the quadratic model of the loss around the dense model.

A change D of a matrix changes its output by D x, and the loss by 1/2 E[(g^T D x)^2] with g the gradient of the loss at the
output: the Fisher information is used as the Hessian. Assuming that x and g are independent, this is 1/2 tr(F D C D^T) with
C = E[x x^T], F = E[g g^T] (KFAC, arXiv 1503.05671). For a structure that replaces a whole FFN, D x is the change of the FFN's
output, and F that of the gradient there. Changes of several matrices are assumed to add up, which holds if each is small.

Directions that never occur in the calibration tokens would cost nothing, such as hidden units that were never active, although
some are active on other text. One more token is therefore counted, of which nothing is known, see `unseen`.

On its calibration tokens a fit loses less than on others. If there are few tokens for the channels of an input or output
(`winnow.calibration.few_tokens`), C and F are therefore replaced by their expectation for other text from
`winnow.factors.shrinkage`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from winnow.calibration.reader import Layers, Statistics
from winnow.errors import InputError
from winnow.factors.outer import predict_outer
from winnow.factors.shrinkage import expected, expected_jointly
from winnow.models.architectures import GRADIENTS, group_name, reads
from winnow.models.files import ModelFiles
from winnow.structures.base import Problem, Structure

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
PREDICTED = "predicted"  # in the file of a fit whose tensors are left out: what `predict` says of it


def predict(
    files: ModelFiles,
    moments: Layers,
    gradients: Layers,
    factors: Mapping[str, Layers],
    structure: Structure,
    device: str,
    outer: Layers | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (group name, predicted increase of the loss (sizes + 1,), nats per token) for every group with a fit in `factors`
    (by name). Size 0 has only the parts stored at every size; for low rank, the matrix is removed. `outer`: statistics of the
    embeddings and the head, if there are fits of them. A fit that was stored without its tensors has its prediction already.

    Experts of a mixture are skipped, as they have no gradients. Raises InputError, naming the matrix, if a statistic is not
    finite.
    """
    inputs, outputs = Statistics(moments, device), Statistics(gradients, device)
    needs = dict.fromkeys(("gram", "count", "max_abs", *(need for need in structure.needs() if need not in GRADIENTS)))
    for group in structure.groups(files.matrices):
        name = group_name(group)
        if group[0].expert is not None or name not in factors:
            continue
        fit = factors[name].tensors(f"{name}.safetensors")
        if PREDICTED in fit:
            yield name, fit[PREDICTED]
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
                {name: {"gradient_gram": expected(gram, tokens[name])} for name, gram in gradients_of.items()},
            )
        except FloatingPointError as error:
            raise InputError(f"{group[0].module}: {error}") from error
        fit = {key: value.to(device) for key, value in fit.items()}
        predicted = structure.predicted(problem, fit)[: len(fit["numbers"])].cpu()
        log.info("%s: %.3g nats per token at size 0, %.3g at the largest", name, float(predicted[0]), float(predicted[-1]))
        yield name, predicted
    rest = Statistics(outer, device)
    for (matrix,) in structure.groups(structure.supported(files.outer)):
        if (name := group_name([matrix])) in factors:
            fit = factors[name].tensors(f"{name}.safetensors")
            if PREDICTED in fit:
                yield name, fit[PREDICTED]
                continue
            predicted = predict_outer(files, structure, matrix, rest, fit)[: len(fit["numbers"])].cpu()
            log.info("%s: %.3g nats per token at size 0, %.3g at the largest", name, float(predicted[0]), float(predicted[-1]))
            yield name, predicted


def on_other_text(sites: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Input statistics of a group by matrix, with the Gram matrices that are expected for other text."""
    *inner, last = sites
    if "cross" not in sites[last]:
        return {name: site | {"gram": expected(site["gram"], int(site["count"]))} for name, site in sites.items()}
    x, h = expected_jointly(sites[inner[-1]], sites[last], int(sites[last]["count"]))
    return dict.fromkeys(inner, x) | {last: h}


def unseen(site: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of a site with its gram (n, n) after one additional token with independent channels. The energy of each is that
    of a typical maximum: the median of the nonzero squares of `max_abs` (n,)."""
    count, reached = float(site["count"]), site["max_abs"].square()
    gram = site["gram"] * (count / (count + 1))
    if (reached > 0).any():
        gram.diagonal().add_(reached[reached > 0].median() / (count + 1))
    return site | {"gram": gram}


def predicted_table(predicted: dict[str, list[float]]) -> pd.DataFrame:
    """The table predicted.parquet: group, predicted (nats per token by size)."""
    import pandas as pd  # here, as `factorize` also predicts, without a table

    return pd.DataFrame([{"group": n, "predicted": losses} for n, losses in predicted.items()], columns=["group", "predicted"])
