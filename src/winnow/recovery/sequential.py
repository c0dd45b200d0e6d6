"""`sequential`: low-rank factors refitted in closed form and rounded matrices rounded again, in the order of the forward pass, on
inputs of the compressed model.

With W (m, n) the dense matrix, x its input in the dense model and x' in the compressed one: `anchored` minimises sum ||W x - W'
x'||^2, whose target is B = W X X'^T (X' X'^T)^-1, `shifted` sum ||(W - W') x'||^2, whose target is B = W. In the metric G = X'
X'^T the best rank-k map is U_k U_k^T B. A small multiple of I is added to the moments X X'^T and X' X'^T, as if all directions
had occurred a little without error: otherwise directions that hardly occur in the calibration text would be extrapolated from a
few tokens, with large errors on other text. Gauge-fixed factors (`gauge_fixed`) keep their stored rows. If layers share a right
factor R (`basis_sharing`), it is unchanged and the left one is fitted to it: B G R^T (R G R^T)^+.

A rounded matrix is B, or what factors beside it leave of B, rounded on the stored grid with error feedback in the metric G, see
`winnow.recovery.reround`.

With `outputs: gradient` an error e of the output is weighted as e^T F e, with F the second moment of the gradient of the loss at
this output in the dense model, as in the metric `two_sided`: U are the left singular vectors of F^{1/2} B G^{1/2}, and rounding
errors are fed back along rows and columns. With `biases: fitted` the means m and m' are subtracted from x and x', and b' = b + W
m - W' m', so that errors have mean 0 and the rest of the fit is of the remainder.

Source: objectives 4 and 2 of AA-SVD, arXiv 2604.02119; for rounding, `anchored` is the objective of GPTAQ, arXiv 2504.02692."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from winnow.models.experts import Expert
from winnow.numerics.linalg import finite, leading_directions
from winnow.numerics.modules import LowRankLinear, RoundedLinear, RowsLinear, SharedLinear, SumLinear
from winnow.numerics.products import gram_of
from winnow.numerics.rotated import RotatedLinear
from winnow.recovery.base import Given
from winnow.recovery.blocks import Calls, Passage, Reached, outputs_of
from winnow.recovery.divergence import divergence, mean_of_windows, predictions
from winnow.recovery.reround import beside, round_again, rounded_of

log = logging.getLogger(__name__)
PRECISION = 2.0**-24  # relative rounding error of the activations
RIDGE = 1e-4  # added to the moments, as a share of the median energy of the inputs
KEYS = ("held_out_start", "held_out_best")
Factors = LowRankLinear | RowsLinear
Refitted = Factors | RoundedLinear | RotatedLinear | SumLinear


@torch.no_grad()
def refit(given: Given) -> dict[str, Any]:
    """Refit the low-rank factors of `given.model` and round its rounded matrices again, in place; returns {blocks: {name:
    held-out losses}}, as `refine` does.

    A block is left unchanged if its error on the held-out windows does not decrease; with `outputs: gradient`, where such a block
    can still be an improvement, the whole model is left unchanged if its divergence from the dense model does not decrease.
    Resumes after the last saved block. Other modules are left unchanged and named in the report; these may be all, in a dense
    model or if an allocation chooses only other structures. Raises InputError for `outputs: gradient` with a model without
    logits, FloatingPointError if predictions are then not finite, or, naming the matrix, if a fit is not."""
    modules = {name: given.model.get_submodule(name) for name in given.modules}
    refitted: dict[str, Refitted] = {name: module for name, module in modules.items() if _refits(given, name, module)}  # type: ignore[misc]
    others = [name for name in given.modules if name not in refitted and not _dense(given, name)]
    if others:
        log.info("left unchanged, as they are not rounded, have no low-rank factors, or are experts: %s", ", ".join(others))
    named = (pair for name, module in refitted.items() for pair in _numbers(given, name, module).items())
    flat = {
        name: weight.data for name, weight in {id(weight): (name, weight) for name, weight in named}.values()
    }  # tied ones once
    blocks = list(given.blocks.values())
    numbers = torch.zeros(len(blocks), 2, dtype=torch.float64)
    weighted = given.options.outputs == "gradient"
    start, before = ({name: value.clone() for name, value in flat.items()}, _held_out(given)) if weighted and flat else ({}, 0.0)
    done = given.resume.restore({**flat, "numbers": numbers}) if given.resume else 0
    models = (given.model, given.dense) if given.options.objective == "anchored" else (given.model,)
    ways = [[Passage(model, blocks, part, given.options.batch) for model in models] for part in given.split()]
    for index, block in list(enumerate(blocks))[done:]:
        own = {name: module for name, module in refitted.items() if name.startswith(f"{block}.")}
        if own:
            numbers[index] = torch.tensor(_block(given, index, own, ways), dtype=torch.float64)
        if given.resume:
            given.resume.save(index + 1, {**flat, "numbers": numbers})
    rows = {name: dict(zip(KEYS, row, strict=True)) for name, row in zip(blocks, numbers.tolist(), strict=True)}
    kept = [name for name, row in rows.items() if row["held_out_best"] == row["held_out_start"]]
    report: dict[str, Any] = {"loss": "squared error over mean square of the target", "blocks": rows}
    if start:
        after = _held_out(given)
        report["divergence"] = {"held_out_start": before, "held_out_best": min(before, after)}  # nats per token
        log.info("KL divergence from the dense model on held-out windows %.6g before, %.6g after", before, after)
        if not after < before:
            for name, value in start.items():
                flat[name].copy_(value)
            kept = blocks
    return {**report, "left_as_they_were": [*kept, *others]}


def _refits(given: Given, name: str, module: nn.Module) -> bool:
    """Whether a module has factors of its own, or a rounded matrix that the options do not leave fixed; not in experts, which
    receive other tokens in the compressed model than in the dense one."""
    if isinstance(given.model.get_submodule(name.rpartition(".")[0]), Expert):
        return False
    if isinstance(module, Factors):
        both = (module.left, module.right)
        return all(isinstance(part, nn.Linear) and not isinstance(part, SharedLinear) for part in both)
    return given.options.rounded == "codes" and rounded_of(module) is not None


def _numbers(given: Given, key: str, module: Refitted) -> dict[str, Tensor]:
    """{name: tensor} of the matrix `key` that are refitted."""
    found: dict[str, Tensor]
    where, owner = _bias_of(key, module)
    if isinstance(module, Factors):
        found = {f"{key}.left.weight": module.left.weight, f"{key}.right.weight": module.right.weight}
    else:
        rounded = rounded_of(module)
        assert rounded is not None
        found = {f"{key}.{rounded.name}steps": rounded.matrix.steps}
    if given.options.biases == "fitted" and owner.bias is not None:
        found[f"{where}.bias"] = owner.bias
    return found


def _bias_of(key: str, module: Refitted) -> tuple[str, Any]:
    """(name, module) of the part of the matrix `key` that has its bias."""
    if isinstance(module, LowRankLinear):
        return f"{key}.left", module.left
    return _bias_of(f"{key}.kept", module.kept) if isinstance(module, SumLinear) else (key, module)  # type: ignore[arg-type]


def _held_out(given: Given) -> float:
    """KL divergence from the dense model on the held-out windows, nats per token. Raises FloatingPointError if it is not
    finite."""
    held, device = given.split()[1], next(given.model.parameters()).device
    loss = lambda ids: divergence(*predictions(given, ids, "use `outputs: equal`"))  # noqa: E731
    found = mean_of_windows(loss, held, given.options.batch, device)
    if not math.isfinite(found):
        raise FloatingPointError(
            "the divergence of the model's predictions from the dense model's is not finite on the held-out windows"
        )
    return found


def _dense(given: Given, name: str) -> bool:
    """Whether a module has the same type and shapes as in the dense model."""
    own, dense = (model.get_submodule(name) for model in (given.model, given.dense))
    return type(own) is type(dense) and all(p.shape == q.shape for p, q in zip(own.parameters(), dense.parameters(), strict=True))


def _block(given: Given, index: int, refitted: dict[str, Refitted], ways: list[list[Passage]]) -> tuple[float, float]:
    """Refit the matrices `refitted` of block `index`; returns its held-out loss (before, after). `ways`: of the fitted and the
    held-out windows, each through the compressed and, for `anchored`, the dense model."""
    options, device = given.options, ways[0][0].device
    name = ways[0][0].blocks[index]
    block, dense = given.model.get_submodule(name), given.dense.get_submodule(name)
    calls, inputs = ([way.go_to(index) for way in part] for part in ways)
    target = outputs_of(dense, inputs[-1], options.batch, device)
    skipped = 0 if given.first_token else 1

    def error() -> float:
        difference = outputs_of(block, inputs[0], options.batch, device) - target
        return float(difference[:, skipped:].double().square().mean() / target[:, skipped:].double().square().mean())

    start = error()
    before = [(own, own.clone()) for key, module in refitted.items() for own in _numbers(given, key, module).values()]
    for group in _readers(block, calls[0], refitted, options.batch, device):
        seen = _moments(given, name, group[0], calls, skipped)
        for key in group:
            _fit(given, key, refitted[key], seen)
    after = error()
    log.info("%s: held-out loss %.6g before, %.6g after", name, start, after)
    if after < start or options.outputs == "gradient":
        return start, after
    for own, value in before:
        own.copy_(value)
    return start, start


def _readers(block: nn.Module, calls: Calls, refitted: dict[str, Refitted], batch: int, device: Any) -> list[list[str]]:
    """The names of the matrices in the order in which the block uses them; those with the same input are grouped."""
    seen: list[tuple[Tensor, list[str]]] = []

    def watch(key: str) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            if not seen or seen[-1][0] is not args[0]:
                seen.append((args[0], []))
            seen[-1][1].append(key)

        return hook

    hooks = [module.register_forward_pre_hook(watch(key)) for key, module in refitted.items()]
    calls.run(block, slice(0, batch), device)
    for hook in hooks:
        hook.remove()
    return [names for _, names in seen]


@dataclass
class Inputs:
    """Statistics of a matrix's inputs x' in the compressed and x in the dense model, float64: G = X' X'^T and X X'^T (n, n), and
    the means m' and m (n,). Without the dense model, x is x'."""

    gram: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    count: int

    def moments(self, centred: bool) -> tuple[Tensor, Tensor]:
        """(G, X X'^T) with the ridge, centred if `centred`. The ridge is relative to the median energy of inputs that vary, since
        massive activations and inactive neurons would distort the mean."""
        gram, cross = self.plain(centred)
        energies = gram.diagonal()[gram.diagonal() > 0]
        ridge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (RIDGE * energies.median() if len(energies) else 1.0)
        return gram + ridge, cross + ridge

    def plain(self, centred: bool) -> tuple[Tensor, Tensor]:
        """(G, X X'^T) without the ridge. Inputs are constant if they only vary by rounding; their moments are 0."""
        gram, cross = self.gram.clone(), self.cross.clone()
        if centred:
            outer = self.count * self.mean
            gram -= torch.outer(self.mean, outer)
            cross -= torch.outer(self.dense_mean, outer)
        still = gram.diagonal() <= self.count * torch.finfo(gram.dtype).eps * self.gram.diagonal()
        gram[still], gram[:, still], cross[:, still] = 0.0, 0.0, 0.0
        return gram, cross


def _moments(given: Given, name: str, key: str, calls: list[Calls], skipped: int) -> Inputs:
    """Statistics of the inputs of the matrix `key` in the compressed model, and in the dense one if its calls are given."""
    caught: list[Tensor] = []
    models = (given.model, given.dense)[: len(calls)]

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise Reached

    hooks = [model.get_submodule(key).register_forward_pre_hook(catch) for model in models]
    device, batch, (count, length, _) = next(given.model.parameters()).device, given.options.batch, calls[0].hidden.shape
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in calls]
    totals = [torch.zeros((), dtype=torch.float64, device=device) for _ in calls]
    for start in range(0, count, batch):
        for model, of in zip(models, calls, strict=True):
            with suppress(Reached):
                of.run(model.get_submodule(name), slice(start, start + batch), device)
        own, *dense = (x.reshape(-1, length, x.shape[-1])[:, skipped:].flatten(0, 1).double() for x in caught)
        caught.clear()
        sums = [total + product for total, product in zip(sums, [gram_of(own), *(gram_of(x, own) for x in dense)], strict=True)]
        totals = [total + x.sum(0) for total, x in zip(totals, [own, *dense], strict=True)]
    for hook in hooks:
        hook.remove()
    tokens = count * (length - skipped)
    return Inputs(sums[0], sums[-1], totals[0] / tokens, totals[-1] / tokens, tokens)


def _fit(given: Given, key: str, module: Refitted, seen: Inputs) -> None:
    """Set the module to the best factors of its rank, in their stored dtypes, or to other codes, and to the best bias for these.
    Raises FloatingPointError, naming the matrix, if it, its inputs or the fit are not finite."""
    dense: Any = given.dense.get_submodule(key)
    weight = (dense.weight.T if isinstance(dense, Conv1D) else dense.weight).double()
    if not all(map(finite, (weight, seen.gram, seen.cross))):
        raise FloatingPointError(f"{key}: its weight, or its inputs on the calibration windows, are not finite")
    found = _numbers(given, key, module)
    places = [name for name in found if name.endswith(".bias")]
    gram, cross = seen.moments(centred=bool(places))
    target = weight
    if given.options.objective == "anchored":
        target = weight + torch.linalg.solve(gram, weight @ (cross - gram), left=False)
    if isinstance(module, Factors):
        _fit_factors(given, key, module, target, gram)
    else:
        _round(given, key, module, target, seen.plain(centred=bool(places))[0])
    for name in places:
        found[name].zero_()
        own = module(seen.mean.to(found[name].dtype)[None])[0].double()  # with the stored factors
        found[name].copy_((dense.bias.double() + weight @ seen.dense_mean - own).to(given.dtypes[name]))
    for name, value in found.items():
        if not finite(value):
            raise FloatingPointError(f"{name} is not finite after the fit")


def _outputs(given: Given, key: str) -> Tensor | None:
    """The metric F of the outputs of the matrix `key`; None for I."""
    if given.options.outputs != "gradient":
        return None
    assert given.outputs is not None  # statistics that are inputs of the rule
    return given.outputs(key)


def _round(given: Given, key: str, module: RoundedLinear | RotatedLinear | SumLinear, target: Tensor, gram: Tensor) -> None:
    """Round again the rounded matrix of a module for a `target` (m, n) of the whole module."""
    rounded, kept = rounded_of(module), beside(module)
    assert rounded is not None
    round_again(rounded, target if kept is None else target - kept, gram, _outputs(given, key), key)


def _fit_factors(given: Given, key: str, module: Factors, weight: Tensor, gram: Tensor) -> None:
    """Set the module to the best factors of its rank for a `weight` (m, n)."""
    tied = given.model.all_tied_weights_keys
    if f"{key}.right.weight" in {*tied, *tied.values()}:
        right = module.right.weight.double()
        projected = right @ gram
        left = weight @ projected.T @ torch.linalg.pinv(projected @ right.T, rtol=len(gram) * PRECISION**2, hermitian=True)
        module.left.weight.copy_(left.to(given.dtypes[f"{key}.left.weight"]))
        return
    rank = module.right.out_features
    found = leading_directions(weight, gram, PRECISION, _outputs(given, key), largest=rank)
    left, right = found.left, found.right
    if isinstance(module, RowsLinear):
        places = module.order.long().argsort()  # positions of the stored rows, then of the others
        rows, others = places[:rank], places[rank:]
        left, right = torch.linalg.solve(left[rows], left[others], left=False), left[rows] @ right
    for part, value in (("left", left), ("right", right)):
        own = getattr(module, part).weight
        own.copy_(value.to(given.dtypes[f"{key}.{part}.weight"]))
