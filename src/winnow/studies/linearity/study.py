"""Study of linear recoverability (R2_lin, arXiv 2606.19379): how affine an FFN is, and the loss of replacing it."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

from winnow.studies.base import Conclusion, Evidence, Given, Study
from winnow.studies.claims import Answer

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedModel

    from winnow.evaluation.results import PerWindow
    from winnow.studies.linearity.found import BlockScores, Linear, Probe, Swap, TrainedMap
    from winnow.studies.linearity.recoverability import Block, Sums
    from winnow.studies.records import Missing

FOLDS = 5
ROWS = 15_000  # tokens for gradient training, from the paper's survey
WINDOWS = 32  # evaluation windows for swaps
HEAL = {"steps": 200, "rate": 1e-4, "batch": 4}  # from the paper
TRAINED, EVERY = 3000, 500  # steps of the trained baseline, and steps between its scores
PROBES = {"rank": 16, "steps": 3000}
ANSWERED = (
    *("highest", "lowest", "turns", "definition", "first_token", "trained", "standardised", "size", "swap", "heal"),
    *("bilinear", "signal", "learned", "learned_directions", "learned_order"),
)


class LinearityStudy(Study):
    title = "Linear recoverability of FFN blocks"
    reference = "R2_lin, arXiv 2606.19379"
    reads = ("windows", "evaluation")
    tables = ("blocks", "tokens", "ranks", "trained", "swaps", "learned", "changes")
    figures = ("profile", "swaps", "learned")

    def measure(self, given: Given) -> Linear | Missing:
        """R^2 of every block by all definitions, folds and token counts, also untrained; probes of the most and least linear
        blocks; swaps."""
        import torch

        from winnow.checkpoint.loading import load_model
        from winnow.studies.linearity.learned import sizes_of, untrained_blocks
        from winnow.studies.linearity.recoverability import collect_sums, ffn_blocks

        assert given.windows is not None
        assert given.evaluation is not None
        blocks = ffn_blocks(given.files.matrices)
        if not blocks:
            return {"missing": "the model has no FFN but mixtures of experts"}
        directory = given.files.verify()
        model = load_model(directory, given.dtype, given.device)
        model.requires_grad_(False)
        batch = max(1, 4096 // given.windows.shape[1])
        sums = collect_sums(model, blocks, given.windows, FOLDS, batch)
        rows = [_block(block, sums[block.layer]) for block in blocks]
        order = sorted(range(len(rows)), key=lambda i: rows[i]["scalar"])
        chosen = {"least": blocks[order[0]], "most": blocks[order[-1]]}
        with torch.random.fork_rng(devices=[]):
            probes = {name: _probes(model, block, given.windows) for name, block in chosen.items()}
        ids, first = (part[:WINDOWS] for part in given.evaluation)
        swaps = _swaps(model, blocks, sums, ids, first)
        healed: dict[str, list[Swap]] = {}
        for name, block in chosen.items():
            with torch.random.fork_rng(devices=[]):
                healed[name] = _healed(model, block, sums[block.layer], given.windows, ids, first)
        identities, sizes = _identities(sums), sizes_of(model)
        del model, sums  # frees memory for an untrained model
        learned = untrained_blocks(directory, sizes, blocks, given.windows, FOLDS, given.dtype, given.device)
        return {
            "blocks": rows,
            "probes": probes,
            "swaps": swaps,
            "healed": healed,
            "identities": identities,
            "learned": learned,
        }

    def conclude(self, evidence: Evidence) -> Conclusion:
        import pandas as pd

        from winnow.studies.linearity.learned import change_rows, learned_figure, learned_rows

        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables}
        answers: dict[str, dict[str, Answer]] = {}
        identities: list[dict[str, Any]] = []
        measured: dict[str, Linear] = evidence.measured
        for model, found in measured.items():
            for claim, answer in _answers(found).items():
                answers.setdefault(claim, {})[model] = answer
            if "missing" in found:
                continue
            for row in found["blocks"]:
                listed = ("folds", "tokens", "ranks")
                tables["blocks"].append({"model": model, **{key: v for key, v in row.items() if key not in listed}})
                tables["tokens"] += [{"model": model, "layer": row["layer"], **point} for point in row["tokens"]]
                tables["ranks"] += [{"model": model, "layer": row["layer"], "rank": k, "r2": v} for k, v in row["ranks"]]
            for name, probe in found["probes"].items():
                tables["trained"] += [{"model": model, "block": name, "layer": probe["layer"], **row} for row in probe["trained"]]
            tables["swaps"] += [{"model": model, **row} for row in found["swaps"]]
            for name, rows in found["healed"].items():
                tables["swaps"] += [{"model": model, **row, "block": name} for row in rows]
            tables["learned"] += [{"model": model, **row} for row in learned_rows(found)]
            tables["changes"] += [{"model": model, **row} for row in change_rows(found)]
            identities += [{"model": model, "identity": name, "residual": value} for name, value in found["identities"].items()]
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
        figures = {"profile": _profile_figure(frames["blocks"]), "swaps": _swaps_figure(frames)}
        figures["learned"] = learned_figure(frames["learned"])
        return Conclusion(frames, figures, answers, pd.DataFrame(identities))


def _block(block: Block, folds: list[tuple[Sums, Sums]]) -> BlockScores:
    """All least-squares results of a block; every fold is held out once, only the last one for single numbers."""
    from winnow.studies.linearity.recoverability import least_squares, r2_scores, rank_for_share, reduced_rank, total

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
    import torch

    from winnow.studies.linearity.recoverability import tapped

    xs, ys, device = [], [], next(model.parameters()).device
    with torch.no_grad(), tapped(model, [block], windows.shape[1]) as seen:
        for ids in windows[: max(3, ROWS // windows.shape[1])].split(16):
            model.base_model(input_ids=ids.to(device).long(), use_cache=False)
            xs.append(seen[block.layer]["x"].flatten(0, 1).float().cpu())
            ys.append(seen[block.layer]["y"].flatten(0, 1).float().cpu())
    return torch.cat(xs), torch.cat(ys)


def _probes(model: PreTrainedModel, block: Block, windows: Tensor) -> Probe:
    """The trained baseline compared with the closed form, on raw and standardised inputs; the bilinear probe of the residual."""
    from winnow.studies.linearity.recoverability import Sums, bilinear_gain, least_squares, r2_scores, train_affine

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
    from winnow.evaluation.perplexity import evaluate

    return evaluate(model, None, ids, first, max(1, 4096 // ids.shape[1]))


def _swaps(
    model: PreTrainedModel, blocks: list[Block], sums: dict[int, list[tuple[Sums, Sums]]], ids: Tensor, first: Tensor
) -> list[Swap]:
    """The loss with one block at a time replaced by its affine map, of full rank and truncated to a quarter of it."""
    import torch

    from winnow.evaluation.spread import paired
    from winnow.studies.linearity.recoverability import affine_module, least_squares, swapped, total

    dense = _loss(model, ids, first)
    found: list[Swap] = []
    for block in blocks:
        train = total(pair[0] for pair in sums[block.layer])
        fit = least_squares(train)
        centred = train.xx[:-1, :-1] - torch.outer(train.xx[-1, :-1], train.xx[-1, :-1]) / train.count
        lead = torch.linalg.eigh(fit[:-1].T @ centred @ fit[:-1]).eigenvectors.flip(1)
        means = (train.xx[-1, :-1] / train.count, train.xy[-1] / train.count)
        for rank in (fit.shape[1], fit.shape[1] // 4):
            slope = fit[:-1] @ lead[:, :rank] @ lead[:, :rank].T
            cut = torch.cat([slope, (means[1] - means[0] @ slope)[None]])
            with swapped(model, block, affine_module(cut).to(ids.device), ids.shape[1]):
                rows = _loss(model, ids, first)
            delta, error = paired(rows, dense)
            found.append({"layer": block.layer, "rank": rank, "healed": "no", "delta_nll": delta, "delta_nll_se": error})
    return found


def _healed(
    model: PreTrainedModel,
    block: Block,
    folds: list[tuple[Sums, Sums]],
    windows: Tensor,
    ids: Tensor,
    first: Tensor,
) -> list[Swap]:
    """The affine map, and the dense FFN as control, after the same steps of Adam on the calibration windows."""
    from winnow.evaluation.spread import paired
    from winnow.studies.linearity.recoverability import affine_module, least_squares, swapped, total

    dense = _loss(model, ids, first)
    found: list[Swap] = []
    affine = affine_module(least_squares(total(pair[0] for pair in folds)))
    with swapped(model, block, affine, ids.shape[1]):
        _train(model, list(affine.parameters()), windows)
        swap = _loss(model, ids, first)
    control = copy.deepcopy(model)
    modules = {block.enters.rpartition(".")[0], block.leaves.rpartition(".")[0]}
    ffn = [p for name in sorted(modules) for p in control.get_submodule(name).parameters()] if len(modules) == 1 else []
    own = ffn or [p for name in (block.enters, block.leaves) for p in control.get_submodule(name).parameters()]
    for parameter in own:
        parameter.requires_grad_(True)
    _train(control, own, windows)
    for name, rows in (("affine", swap), ("dense control", _loss(control, ids, first))):
        delta, error = paired(rows, dense)
        rank = affine.weight.shape[0]
        found.append({"layer": block.layer, "rank": rank, "healed": name, "delta_nll": delta, "delta_nll_se": error})
    above, error = paired(swap, _loss(control, ids, first))
    return [*found, {"layer": block.layer, "healed": "affine above control", "delta_nll": above, "delta_nll_se": error}]


def _train(model: PreTrainedModel, parameters: list[Any], windows: Tensor) -> None:
    """Adam on the next-token loss of calibration windows, in a random order with a fixed seed."""
    import torch

    optimizer = torch.optim.Adam(parameters, lr=HEAL["rate"])
    order, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    for step in range(int(HEAL["steps"])):
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
    from winnow.studies.linearity.recoverability import least_squares, r2_scores, reduced_rank, total

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


def _answers(found: Linear) -> dict[str, Answer]:
    from winnow.studies.linearity.learned import FRESH, RESIZED, change, correlation, rank_correlation

    if "missing" in found:
        return dict.fromkeys((f"linearity_{name}" for name in ANSWERED), Answer(missing=found["missing"]))
    blocks = sorted(found["blocks"], key=lambda row: row["layer"])
    r2 = [row["scalar"] for row in blocks]
    errors = {row["layer"]: row["scalar_fold_se"] for row in blocks}
    top, low = (pick(blocks, key=lambda row: row["scalar"]) for pick in (max, min))
    steps = [b - a for a, b in itertools.pairwise(r2)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(steps))
    full = {row["layer"]: row for row in found["swaps"] if row["rank"] == max(r["rank"] for r in found["swaps"])}
    cheapest = min(full.values(), key=lambda row: row["delta_nll"])
    rank = rank_correlation(r2, [full[row["layer"]]["delta_nll"] for row in blocks])
    chance = 1 / math.sqrt(max(1, len(r2) - 1))  # standard error of the rank correlation of unrelated numbers
    last = {p: {r["inputs"]: r["r2"] for r in found["probes"][p]["trained"]} for p in found["probes"]}
    control = found["healed"]["most"][-1]
    return {
        "linearity_highest": Answer(top["scalar"], errors[top["layer"]]),
        "linearity_lowest": Answer(low["scalar"], errors[low["layer"]]),
        "linearity_turns": Answer(float(turns)),
        "linearity_definition": Answer(max(row["scalar"] - row["feature"] for row in blocks)),
        "linearity_first_token": Answer(top["scalar"] - top["no_first_token"], errors[top["layer"]]),
        "linearity_trained": Answer(last["most"]["closed form"] - last["most"]["as they are"]),
        "linearity_standardised": Answer(last["most"]["closed form"] - last["most"]["standardised"]),
        "linearity_size": Answer(top["times_smaller"]),
        "linearity_swap": Answer(cheapest["delta_nll"], cheapest["delta_nll_se"]),
        "linearity_heal": Answer(control["delta_nll"], control["delta_nll_se"]),
        "linearity_bilinear": Answer(max(found["probes"][p]["bilinear_gain"] for p in found["probes"])),
        "linearity_signal": Answer(rank, chance),
        "linearity_learned": Answer(*change(found, FRESH, "scalar")),
        "linearity_learned_directions": Answer(*change(found, RESIZED, "scalar")),
        "linearity_learned_order": Answer(correlation(found, FRESH, "scalar"), chance),
    }


def _profile_figure(blocks: pd.DataFrame) -> Any:
    from winnow.reporting.figures import axes_grid, line_style, shared_legend

    models = list(blocks["model"].unique()) if len(blocks) else []
    figure, axes = axes_grid(len(models))
    shown = {"scalar": "grand mean (published)", "feature": "own mean of every output", "median": "median over outputs"}
    shown |= {"no_first_token": "grand mean, without first tokens"}
    for axis, model in zip(axes, models, strict=True):
        rows = blocks[blocks["model"] == model].sort_values("layer")
        for i, (key, label) in enumerate(shown.items()):
            style = {"markersize": 4, "linewidth": 1.2, **line_style(i)}
            if key == "no_first_token":  # often the same as with them: open markers let the line below be seen
                style |= {"markersize": 8, "linestyle": "--", "fillstyle": "none"}
            axis.plot(rows["layer"], rows[key].clip(lower=-1), label=label, **style)
        axis.set_title(f"{model}: held-out R² of the affine map", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylabel("R² (share of the variance)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    shared_legend(figure, axes, "variance about")
    return figure


def _swaps_figure(frames: dict[str, pd.DataFrame]) -> Any:
    from winnow.reporting.figures import axes_grid, line_style

    swaps, blocks = frames["swaps"], frames["blocks"]
    models = list(blocks["model"].unique()) if len(blocks) else []
    figure, axes = axes_grid(len(models))
    for axis, model in zip(axes, models, strict=True):
        own = swaps[(swaps["model"] == model) & (swaps["healed"] == "no")]
        rows = own[own["rank"] == own["rank"].max()].merge(blocks[blocks["model"] == model], on="layer")
        style = {**line_style(0), "linestyle": "none"}
        axis.errorbar(rows["scalar"], rows["delta_nll"], yerr=2 * rows["delta_nll_se"], markersize=5, capsize=2, **style)
        for _, row in rows.iterrows():
            place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(f"{row['layer']:.0f}", (row["scalar"], row["delta_nll"]), **place)
        axis.set_title(f"{model}: one block swapped (number: its layer)", fontsize=9)
        axis.set_xlabel("held-out R² of the block (grand mean)")
        axis.set_ylabel("loss above dense (nats per token)\nbars: 2 standard errors", fontsize=8)
    return figure
