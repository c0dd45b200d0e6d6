"""The measurement of linear recoverability, piece by piece: a job that was interrupted goes on after the last one."""

from __future__ import annotations

import copy
import itertools
import math
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.checkpoint.loading import load_model
from winnow.evaluation.perplexity import evaluate
from winnow.evaluation.spread import paired
from winnow.io.progress import every
from winnow.studies.base import BATCH, Given, spread
from winnow.studies.linearity.learned import sizes_of, untrained_blocks
from winnow.studies.linearity.recoverability import (
    Block,
    Sums,
    affine_module,
    bilinear_gain,
    collect_sums,
    least_squares,
    r2_scores,
    rank_for_share,
    reduced_rank,
    swapped,
    tapped,
    total,
    train_affine,
)
from winnow.studies.linearity.study import EVERY, FOLDS, HEAL, PROBES, ROWS, TRAINED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.evaluation.results import PerWindow
    from winnow.studies.linearity.found import BlockScores, Linear, Probe, Swap, TrainedMap


class Measurement:
    """The pieces of a measurement; what several need is computed for the first that is not there yet."""

    def __init__(self, given: Given, blocks: list[Block], options: Any):
        self.given, self.blocks, self.options, self.once = given, blocks, options, given.pieces.once
        assert given.windows is not None
        assert given.evaluation is not None
        self.windows, (self.ids, self.first) = given.windows, (part[: options.windows] for part in given.evaluation)
        self.directory = given.files.verify()
        self.steps = options.steps_of(sum(math.prod(t["shape"]) for t in given.files.tensors.values()))

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.directory, self.given.dtype, self.given.device).requires_grad_(False)

    @cached_property
    def sums(self) -> dict[int, list[tuple[Sums, Sums]]]:
        return collect_sums(self.model, self.blocks, self.windows, FOLDS, max(1, BATCH // self.windows.shape[1]))

    @cached_property
    def dense(self) -> PerWindow:
        return _loss(self.model, self.ids, self.first)

    def all(self) -> Linear:
        rows = [self.once(f"block {b.layer}", partial(self._block, b)) for b in every(self.blocks, "blocks")]
        order = sorted(range(len(rows)), key=lambda i: rows[i]["scalar"])
        chosen = {"least": self.blocks[order[0]], "most": self.blocks[order[-1]]}
        probes: dict[str, Probe] = {}
        for name, block in chosen.items():
            with torch.random.fork_rng(devices=[]):
                probes[name] = self.once(f"probe {name}", partial(self._probed, block))
        swaps: list[Swap] = []
        for block in every(spread(self.blocks, self.options.layers), "replaced blocks"):
            swaps += self.once(f"swap {block.layer}", partial(self._swapped, block))
        healed: dict[str, list[Swap]] = {}
        for name, block in chosen.items():
            with torch.random.fork_rng(devices=[]):
                healed[name] = self.once(f"healed {name}", partial(self._healed, block))
        identities = self.once("identities", lambda: _identities(self.sums))
        where = (self.windows, FOLDS, self.given.dtype, self.given.device)
        sizes = sizes_of(self.model)
        for name in ("model", "sums"):  # frees memory for an untrained model
            self.__dict__.pop(name, None)
        learned = untrained_blocks(self.directory, sizes, self.blocks, *where, self.once)
        return {
            "blocks": rows,
            "probes": probes,
            "swaps": swaps,
            "healed": healed,
            "identities": identities,
            "learned": learned,
        }

    def _block(self, block: Block) -> BlockScores:
        return _block(block, self.sums[block.layer])

    def _probed(self, block: Block) -> Probe:
        return _probes(self.model, block, self.windows)

    def _swapped(self, block: Block) -> list[Swap]:
        """The loss with a block replaced by its affine map, of full rank and truncated to a quarter of it."""

        found: list[Swap] = []
        train = total(pair[0] for pair in self.sums[block.layer])
        fit = least_squares(train)
        centred = train.xx[:-1, :-1] - torch.outer(train.xx[-1, :-1], train.xx[-1, :-1]) / train.count
        lead = torch.linalg.eigh(fit[:-1].T @ centred @ fit[:-1]).eigenvectors.flip(1)
        means = (train.xx[-1, :-1] / train.count, train.xy[-1] / train.count)
        for rank in (fit.shape[1], fit.shape[1] // 4):
            slope = fit[:-1] @ lead[:, :rank] @ lead[:, :rank].T
            cut = torch.cat([slope, (means[1] - means[0] @ slope)[None]])
            with swapped(self.model, block, affine_module(cut).to(self.ids.device), self.ids.shape[1]):
                rows = _loss(self.model, self.ids, self.first)
            delta, error = paired(rows, self.dense)
            found.append({"layer": block.layer, "rank": rank, "healed": "no", "delta_nll": delta, "delta_nll_se": error})
        return found

    def _healed(self, block: Block) -> list[Swap]:
        """The affine map, and the dense FFN as control, after the same steps of Adam on the calibration windows."""

        found: list[Swap] = []
        affine = affine_module(least_squares(total(pair[0] for pair in self.sums[block.layer])))
        with swapped(self.model, block, affine, self.ids.shape[1]):
            _train(self.model, list(affine.parameters()), self.windows, self.steps)
            swap = _loss(self.model, self.ids, self.first)
        control = copy.deepcopy(self.model)
        modules = {block.enters.rpartition(".")[0], block.leaves.rpartition(".")[0]}
        ffn = [p for name in sorted(modules) for p in control.get_submodule(name).parameters()] if len(modules) == 1 else []
        own = ffn or [p for name in (block.enters, block.leaves) for p in control.get_submodule(name).parameters()]
        for parameter in own:
            parameter.requires_grad_(True)
        _train(control, own, self.windows, self.steps)
        beside = _loss(control, self.ids, self.first)
        for name, rows in (("affine", swap), ("dense control", beside)):
            delta, error = paired(rows, self.dense)
            rank = affine.weight.shape[0]
            found.append({"layer": block.layer, "rank": rank, "healed": name, "delta_nll": delta, "delta_nll_se": error})
        above, error = paired(swap, beside)
        return [*found, {"layer": block.layer, "healed": "affine above control", "delta_nll": above, "delta_nll_se": error}]


def _block(block: Block, folds: list[tuple[Sums, Sums]]) -> BlockScores:
    """All least-squares results of a block; every fold is held out once, only the last one for single numbers."""

    whole, without = [pair[0] for pair in folds], [pair[0] - pair[1] for pair in folds]
    held = [r2_scores(least_squares(total(whole[:i] + whole[i + 1 :])), whole[i]) for i in range(FOLDS)]
    values = [row["scalar"] for row in held]
    mean = sum(values) / FOLDS
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (FOLDS - 1))
    profile = reduced_rank(total(whole[:-1]), whole[-1])
    width = len(profile) - 1
    marks = sorted({0, 1, 2, 4, 8, *(round(width * share) for share in (0.1, 0.25, 0.5, 0.75)), width})
    bare = r2_scores(least_squares(total(without[:-1])), without[-1])
    return {
        "layer": block.layer,
        **held[-1],
        "scalar_mean": mean,
        "scalar_fold_se": spread / math.sqrt(FOLDS),
        "no_first_token": bare["scalar"],
        "rank_90": rank_for_share(profile, 0.9),
        "rank_95": rank_for_share(profile, 0.95),
        "times_smaller": block.numbers / (width * (width + 1)),
        "folds": values,
        "tokens": [
            {"tokens": int(total(whole[:n]).count), **r2_scores(least_squares(total(whole[:n])), whole[-1])}
            for n in range(1, FOLDS)
        ],
        "ranks": [(k, profile[k]) for k in marks],
    }


def _rows(model: PreTrainedModel, block: Block, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs (tokens, d) of a block, float32, on the first `ROWS` tokens."""

    xs, ys, device = [], [], next(model.parameters()).device
    with torch.no_grad(), tapped(model, [block], windows.shape[1]) as seen:
        for ids in windows[: max(3, ROWS // windows.shape[1])].split(16):
            model.base_model(input_ids=ids.to(device).long(), use_cache=False)
            xs.append(seen[block.layer]["x"].flatten(0, 1).float().cpu())
            ys.append(seen[block.layer]["y"].flatten(0, 1).float().cpu())
    return torch.cat(xs), torch.cat(ys)


def _probes(model: PreTrainedModel, block: Block, windows: Tensor) -> Probe:
    """The trained baseline compared with the closed form, on raw and standardised inputs; the bilinear probe of the residual."""

    x, y = _rows(model, block, windows)
    cut, early = int(0.8 * len(x)), int(0.7 * len(x))
    test = Sums.of(x[cut:], y[cut:])
    closed = r2_scores(least_squares(Sums.of(x[:cut], y[:cut])), test)["scalar"]
    trained: list[TrainedMap] = [{"inputs": "closed form", "step": 0, "r2": closed}]
    centre, scale = x[:cut].mean(0), x[:cut].std(0).clamp(min=1e-6)
    for name, inputs in (("as they are", x), ("standardised", (x - centre) / scale)):
        own = Sums.of(inputs[cut:], y[cut:])
        fits = train_affine(inputs[:cut], y[:cut], TRAINED, EVERY, 1e-3, 0)
        trained += [{"inputs": name, "step": step, "r2": r2_scores(fit, own)["scalar"]} for step, fit in fits]
    fit = least_squares(Sums.of(x[:early], y[:early]))
    parts = [(x[:early], y[:early]), (x[early:cut], y[early:cut]), (x[cut:], y[cut:])]
    gain = bilinear_gain(parts, fit, PROBES["rank"], PROBES["steps"], 0)
    return {"layer": block.layer, "trained": trained, "bilinear_gain": gain}


def _loss(model: PreTrainedModel, ids: Tensor, first: Tensor) -> PerWindow:
    return evaluate(model, None, ids, first, max(1, 4096 // ids.shape[1]))


def _train(model: PreTrainedModel, parameters: list[Any], windows: Tensor, steps: int) -> None:
    """Adam on the next-token loss of calibration windows, in a random order with a fixed seed."""

    optimizer = torch.optim.Adam(parameters, lr=HEAL["rate"])
    order, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    for step in every(range(steps), "steps"):
        rows = torch.randint(len(windows), (int(HEAL["batch"]),), generator=order)
        ids = windows[rows].to(device).long()
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite in step {step} of healing")
        optimizer.step()


def _identities(sums: dict[int, list[tuple[Sums, Sums]]]) -> dict[str, float]:
    """Largest residuals over blocks of identities that must hold exactly on the training tokens."""

    worst = {"the residual is orthogonal to [X, 1]": 0.0, "reduced rank d is least squares": 0.0}
    worst["R^2 on training tokens falls with the rank: largest rise"] = 0.0
    names = list(worst)
    for folds in sums.values():
        train = total(pair[0] for pair in folds)
        fit = least_squares(train)
        left = (train.xy - train.xx @ fit).abs() / (train.xx.diagonal().sqrt()[:, None] * train.yy.sqrt() + 1e-300)
        profile = reduced_rank(train, train)
        falls = max([0.0, *(a - b for a, b in itertools.pairwise(profile))])
        found = (float(left.max()), abs(profile[-1] - r2_scores(fit, train)["feature"]), falls)
        worst = {name: max(worst[name], value) for name, value in zip(names, found, strict=True)}
    return worst
