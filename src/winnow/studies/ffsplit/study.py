"""Study of FFSplit (arXiv 2401.04044): neurons with large outputs, their importance, and a split that keeps them."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.studies.base import BATCH, LENGTH, SOLVED, Asked, Conclusion, Evidence, Given, Study, StudyOptions, fewer, speed
from winnow.studies.claims import Answer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from winnow.evaluation.results import PerWindow
    from winnow.io import specs
    from winnow.studies.ffsplit.found import Delta, Quantised, Size, Split, Unsplit, Zeroed, ZeroedRow
    from winnow.studies.ffsplit.heavy import Ffn
    from winnow.studies.records import TimeRow

HEAVY, LIGHT, ZEROED = 0.25, 0.1, 0.03  # from the paper: share of heavy neurons, rank of the light ones, neurons of its ablation
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # of heavy neurons
RANKS = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the light neurons, as shares of their full rank
EQUAL = 0.5  # bytes of the sweep over shares at equal bytes
SEEDS = (0, 1, 2)  # of random neurons
TIMED: specs.Timing = {"batches": [1, 8], "prompts": [64], "decode": 8, "repeats": 11, "warm_up": 2}
WEIGHTS, GRAM, LOW_RANK = {"kind": "weights"}, {"kind": "gram"}, {"kind": "low_rank"}
AT, TUNED = "ffn-0.35", "fine_tuned"
SCORES = ["model", "evaluation", "method", "recovery", "measure", "value", "value_se", "delta", "delta_se"]
SCORES += ["delta_control", "delta_control_se"]
ANSWERED = ["concentrated", "concentrated_output", "any_token", "same_text", "zeroed", "zeroed_random", "zeroed_norm"]
ANSWERED += ["quarter", "ffn_time", "speed", "speed_everywhere", "quantised"]  # in the order of the measurements
SIZES = ["ffn_size", "size", "size_whole"]
COMPARED = {  # pairs of cells, the first minus the second
    "against_low_rank": (("split", AT), ("svd", AT)),
    "against_low_rank_tuned": (("split", AT, TUNED), ("svd", AT, TUNED)),
    "against_random": (("split", AT), ("split_random", AT)),
    "against_random_tuned": (("split", AT, TUNED), ("split_random", AT, TUNED)),
    "against_slice": (("split", AT), ("neuron_slice", AT)),
    "against_slice_tuned": (("split", AT, TUNED), ("neuron_slice", AT, TUNED)),
    "against_whitened": (("split", AT), ("whitened", AT)),
    "whitened": (("split_whitened", AT), ("whitened", AT)),
    "drop": (("split", AT, TUNED), ("dense", "dense", TUNED)),
}


def split_of(
    exact: float = HEAVY, criterion: str = "activation", seed: int = 0, metric: dict[str, Any] = WEIGHTS
) -> dict[str, Any]:
    """A method with a split, as the content of a preset."""
    options: dict[str, Any] = {"kind": "split", "exact": exact, "criterion": criterion}
    return {"structure": options | ({"seed": seed} if seed else {}), "metric": metric}


class FfsplitStudy(Study):
    title = "Heavy hitters and a split FFN"
    reference = "FFSplit, arXiv 2401.04044"
    methods = {
        "split": split_of(),
        "split_random": split_of(criterion="random"),
        "svd": {"structure": LOW_RANK, "metric": WEIGHTS},
        "neuron_slice": {"structure": {"kind": "neuron_slice"}},
        "split_whitened": split_of(criterion="activation_x_row", metric=GRAM),
        "whitened": {"structure": LOW_RANK, "metric": GRAM},
        "split_affine": {"structure": {"kind": "split_affine"}},
    }
    budgets = {AT: {"targets": ["ffn"], "keep_bytes": 0.35}}  # a quarter of the neurons and a tenth of the rank of the others
    recoveries = {TUNED: {"kind": "distill", "nll": 1.0, "steps": 100, "batch": 4}}
    tuned = ("split", "split_random", "svd", "neuron_slice", "split_whitened")
    cells = [*((method, AT) for method in methods), *((method, AT, TUNED) for method in tuned)]
    scored = [("split", AT), ("svd", AT)]
    tables = ("concentration", "zeroed", "sweeps", "loss", "sizes", "latency", "quantised", "scores")
    figures = ("concentration", "zeroed", "sweeps", "loss", "latency", "quantised")
    reads = ("moments", "evaluation")

    class Options(StudyOptions):
        length: int = LENGTH
        windows: int | None = Field(
            None,
            ge=2,
            description="evaluation windows at most, of every loss (about 60 of them); by default 128, fewer for models of more "
            "than 40 million numbers",
        )

        def windows_of(self, numbers: float) -> int:
            return self.windows or fewer(128, numbers)

    def work(self, asked: Asked) -> tuple[float, float]:
        o, shape = self.options, asked.shape
        ffn = [m for m in shape.matrices if m.site.startswith("ffn")]
        svd = SOLVED * sum(max(m.shape) * min(m.shape) ** 2 for m in ffn)
        fits = len(SHARES) + 1 + 4 + len(SEEDS) + 2  # of splits; two more for times and rounding
        losses = 9 + 2 * len(SHARES) + 2 * len(RANKS) + 4 + len(SEEDS) + 18
        tokens = asked.scored(o.windows_of(shape.numbers), o.length)
        memory = 3 * asked.model + asked.logits(min(BATCH, tokens), 4)
        return memory, fits * svd + (losses + 2) * asked.forward(tokens)

    def measure(self, given: Given) -> Split | Unsplit:
        """Concentration by layer, losses without some neurons and with rounded numbers, sweeps of the split, sizes, times
        compared with dense, identities."""
        from winnow.checkpoint.loading import load_model
        from winnow.models.classes import empty_model
        from winnow.structures.base import STRUCTURES
        from winnow.studies.ffsplit.heavy import concentration, ffns_of, heavy_identities
        from winnow.studies.ffsplit.sizes import PUBLISHED, counted, published
        from winnow.studies.ffsplit.sweeps import Sweeps
        from winnow.studies.trials import loss

        given, once = given.cut(self.options.length), given.pieces.once
        files = given.files
        assert given.moments is not None
        assert given.evaluation is not None
        directory, split = files.verify(), STRUCTURES.build(split_of()["structure"])
        sizes = {name: counted(published(name), split, LIGHT) for name in PUBLISHED}
        if any(m.expert is not None for m in files.matrices):
            return {"sizes": sizes, "missing": "a mixture of experts has no FFN that all tokens go through"}
        sizes["this model"] = counted(empty_model(directory), split, LIGHT)
        model = load_model(directory, given.dtype, given.device).requires_grad_(False)
        most = self.options.windows_of(sum(math.prod(t["shape"]) for t in files.tensors.values()))
        ids, first = (part[:most] for part in given.evaluation)
        ffns, dense = ffns_of(files, given.moments), once("dense", lambda: loss(model, ids, first))
        sweeps = Sweeps(given, model, ids, first, dense)
        return {
            "concentration": once("concentration", lambda: concentration(model, ffns, ids, HEAVY)),
            "zeroed": once("zeroed", lambda: _zeroed(model, ffns, ids, first, dense)),
            "sweeps": sweeps.all(),
            "quarter": sweeps.quarter(),
            "sizes": sizes,
            "latency": once("latency", lambda: _latency(given, model)),
            "quantised": once("quantised", lambda: _quantised(given, model, ffns, ids, first, dense)),
            "identities": {**heavy_identities(model, files, ffns, ids), **_split_identities(given, ffns)},
        }

    def conclude(self, evidence: Evidence) -> Conclusion:
        import pandas as pd

        from winnow.studies.ffsplit.figures import drawn

        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables}
        answers: dict[str, dict[str, Answer]] = {"ffsplit_glue": _glue(evidence.scores)}
        if not evidence.measured:  # only classification tasks are configured
            missing = {"any": Answer(missing="no model with an evaluation of kind `perplexity` is configured")}
            answers |= dict.fromkeys((f"ffsplit_{name}" for name in (*ANSWERED, *SIZES, *COMPARED)), missing)
        residuals: list[dict[str, Any]] = []
        measured: dict[str, Split] = evidence.measured
        for model, found in measured.items():
            for claim, answer in _answers(evidence, model, found).items():
                answers.setdefault(claim, {})[model] = answer
            for method, budget, *used in (("dense", "dense", TUNED), *self.cells):
                recovery = evidence.cell(model, method, budget, *used)["recovery"]
                row = evidence.loss(model, method, budget, *used)
                tables["loss"].append({"model": model, "method": method, "recovery": recovery, **row})
            for name, size in found["sizes"].items():
                of = model if name == "this model" else f"{name}, by its config"
                if not any(row["model"] == of for row in tables["sizes"]):
                    tables["sizes"].append(_sizes_row(of, size))
                for claim, answer in _of_sizes(size, name != "this model").items():
                    answers.setdefault(claim, {})[of] = answer
            if "missing" in found:
                continue
            for each in found["concentration"]:
                tables["concentration"].append({"model": model, **{key: value for key, value in each.items() if key != "curve"}})
            tables["zeroed"] += [{"model": model, **row} for row in found["zeroed"]["rows"]]
            tables["sweeps"] += [{"model": model, **row} for row in found["sweeps"]]
            tables["latency"] += [{"model": model, **row} for row in found["latency"]]
            tables["quantised"] += [{"model": model, **row} for row in found["quantised"]]
            residuals += [{"model": model, "identity": name, "residual": v} for name, v in found["identities"].items()]
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
        frames["scores"] = pd.DataFrame(columns=SCORES) if evidence.scores is None else evidence.scores[SCORES]
        return Conclusion(frames, drawn(frames, self.figures), answers, pd.DataFrame(residuals))


def _zeroed(model: PreTrainedModel, ffns: list[Ffn], ids: Tensor, first: Tensor, dense: PerWindow) -> Zeroed:
    """The loss above dense with 3 % of the neurons of every FFN zeroed (`rows`), and pairs of choices (`above`: [nats, error]).
    Random neurons are sampled with several seeds; their error combines those over windows and over seeds."""
    import numpy as np
    import torch

    from winnow.evaluation.spread import over_seeds, paired
    from winnow.studies.ffsplit.heavy import count_of, zeroed
    from winnow.studies.trials import loss

    def without(choose: Any) -> PerWindow:
        with zeroed(model, {ffn.down.module: choose(ffn) for ffn in ffns}):
            return loss(model, ids, first)

    def drawn(seed: int) -> PerWindow:
        generator = torch.Generator().manual_seed(seed)
        return without(lambda ffn: torch.randperm(len(ffn.norms), generator=generator)[: count_of(len(ffn.norms), ZEROED)])

    own = {f"top by {c}": without(lambda ffn, c=c: ffn.top(c, ZEROED)) for c in ("act", "act_x_row", "weight_norm")}
    own |= {f"bottom by {c}": without(lambda ffn, c=c: ffn.bottom(c, ZEROED)) for c in ("act", "act_x_row")}
    seeds = [drawn(seed) for seed in SEEDS]
    mean: PerWindow = {"nll": np.mean([s["nll"] for s in seeds], axis=0).tolist(), "tokens": seeds[0]["tokens"]}
    of_seeds = over_seeds([paired(s, dense)[0] for s in seeds])
    rows: list[ZeroedRow] = [{"zeroed": name, **delta_of(found, dense)} for name, found in own.items()]
    delta = delta_of(mean, dense)
    rows.append({"zeroed": f"random, {len(SEEDS)} seeds", **delta, "delta_nll_se": math.hypot(delta["delta_nll_se"], of_seeds)})
    above, error = paired(own["top by act"], mean)
    pairs = {
        "bottom": paired(own["top by act"], own["bottom by act"]),
        "random": (above, math.hypot(error, of_seeds)),
        "weight_norm": paired(own["top by act"], own["top by weight_norm"]),
    }
    return {"rows": rows, "above": pairs}


def delta_of(found: PerWindow, dense: PerWindow) -> Delta:
    from winnow.evaluation.spread import paired

    delta, error = paired(found, dense)
    return {"delta_nll": delta, "delta_nll_se": error}


def _latency(given: Given, model: PreTrainedModel) -> list[TimeRow]:
    """Times, compared with dense, of the split FFN and of FFNs with a single neuron; the latter is the time outside of FFNs."""
    from winnow.studies.trials import Trial, time_forms

    split = Trial.of(given.files, given.moments, split_of(), given.device)
    one = {"structure": {"kind": "neuron_slice", "criterion": "activation", "correction": "none"}}
    bare = Trial.of(given.files, given.moments, one, given.device)
    forms = {"split": split.model(model, split.of_rank(LIGHT)), "one neuron": bare.model(model, {g.name: 1 for g in bare.groups})}
    return time_forms(model, forms, TIMED, given.device)


def _quantised(
    given: Given, model: PreTrainedModel, ffns: list[Ffn], ids: Tensor, first: Tensor, dense: PerWindow
) -> list[Quantised]:
    from winnow.studies.ffsplit.quantised import quantised_pairs
    from winnow.studies.trials import Trial, loss

    trial = Trial.of(given.files, given.moments, split_of(), given.device)
    sizes = trial.of_rank(LIGHT)
    return quantised_pairs(model, lambda: trial.model(model, sizes), ffns, lambda form: loss(form, ids, first), dense)


def _split_identities(given: Given, ffns: list[Ffn]) -> dict[str, float]:
    """Residuals of the first and the last FFN, relative to the norm of the weights, float64: a light part of full rank or a heavy
    part of all neurons reproduces the weights, and the error of a rank follows from the singular values."""
    import torch

    from winnow.metrics.base import METRICS
    from winnow.structures.base import STRUCTURES, Problem

    full, whole, tails = "light part of full rank = dense", "heavy share 1 = dense", "error of the light part = sum of s^2"
    worst = dict.fromkeys((full, whole, tails), 0.0)
    files = given.files
    for ffn in dict.fromkeys(i for i in (0, len(ffns) - 1)):
        group, down = ffns[ffn].group, ffns[ffn].down
        weights = {m.name: files.weight(m) for m in group}
        biases = {m.name: files.tensor(f"{m.module}.bias").double() for m in group if m.bias}
        sites = {m.name: {"rms": ffns[ffn].scores["act"].sqrt()} if m is down else {} for m in group}
        parts = {m.role: weights[m.name] for m in group if m.role != "gate_up_proj"}
        for m in (m for m in group if m.role == "gate_up_proj"):
            parts |= dict(zip(("gate_proj", "up_proj"), weights[m.name].chunk(2), strict=True))
        total = sum(float(w.square().sum()) for w in parts.values())
        for exact, name in ((HEAVY, full), (1.0, whole)):
            structure = STRUCTURES.build(split_of(exact)["structure"])
            fit = structure.fit(Problem(group, weights, sites, METRICS.build(WEIGHTS), biases=biases), structure.limit(group))
            order, heavy, left, tail = fit.tensors["order"], round(exact * down.shape[1]), 0.0, 0.0
            rank = round(LIGHT * structure.limit(group))
            for role, weight in parts.items():
                axis = 1 if role == down.role else 0
                pieces = [fit.tensors[f"{role}.exact"]]
                if exact < 1:
                    pieces.append(fit.tensors[f"{role}.left"] @ fit.tensors[f"{role}.right"])
                    light = weight.index_select(axis, order[heavy:])
                    tail += float(torch.linalg.svdvals(light)[rank:].square().sum())
                left += float((torch.cat(pieces, axis) - weight.index_select(axis, order)).square().sum())
            worst[name] = max(worst[name], (left / total) ** 0.5)
            if exact < 1:
                worst[tails] = max(worst[tails], abs(float(fit.error[rank]) - tail) / total)
    return worst


def _answers(evidence: Evidence, model: str, found: Split) -> dict[str, Answer]:
    from winnow.studies.ffsplit.quantised import answered

    answers = {f"ffsplit_{name}": Answer(*evidence.above(model, *pair)) for name, pair in COMPARED.items()}
    if "missing" in found:
        return answers | {f"ffsplit_{name}": Answer(missing=found["missing"]) for name in ANSWERED}
    by = {c: [row for row in found["concentration"] if row["criterion"] == c] for c in ("act", "act_x_row")}
    above_of = found["zeroed"]["above"]
    timed = {form: [row for row in found["latency"] if row["form"] == form] for form in ("split", "one neuron")}
    speeds = sorted((speed(row) for row in timed["split"]), key=lambda answer: answer.value or 0.0)
    longest = max(timed["one neuron"], key=lambda row: 1 - row["ratio"])
    values = (
        Answer(min(row["held"] for row in by["act"])),
        Answer(min(row["held"] for row in by["act_x_row"])),
        Answer(statistics.mean(row["per_token"] / row["per_token_best"] for row in by["act"])),
        Answer(statistics.mean(row["same"] for row in by["act"])),
        Answer(*above_of["bottom"]),
        Answer(*above_of["random"]),
        Answer(*above_of["weight_norm"]),
        Answer(*found["quarter"]),
        Answer(100 * (1 - longest["ratio"]), 100 * (longest["ratio_high"] - longest["ratio_low"]) / 4),
        speeds[-1],
        speeds[0],
        Answer(*answered(found["quantised"])),
    )
    return answers | {f"ffsplit_{name}": answer for name, answer in zip(ANSWERED, values, strict=True)}


def _of_sizes(size: Size, claimed: bool) -> dict[str, Answer]:
    """Answers about sizes from a config; savings only if the paper claims them."""
    saved, share = size["saved"], {"ffsplit_ffn_size": Answer(size["ffn_share"]["whole"])}
    if not claimed:
        return share
    low, high = sorted((saved["blocks"], saved["without_embeddings"]))
    whole = Answer(low=saved["whole"], high=saved["whole"])
    return share | {"ffsplit_size": Answer(low=low, high=high), "ffsplit_size_whole": whole}


def _sizes_row(model: str, size: Size) -> dict[str, Any]:
    """Parameter counts, and in % of each the savings by the split and the share of the FFNs."""
    short = {"whole": "all", "without_embeddings": "no_embeddings", "blocks": "blocks"}
    numbers: dict[str, float] = {"all": size["whole"], "no_embeddings": size["without_embeddings"], "blocks": size["blocks"]}
    numbers |= {"ffn": size["ffn"], "ffn_kept": size["ffn_kept"]}
    saved = {f"saved_of_{short[key]}": value for key, value in size["saved"].items()}
    return {"model": model, **numbers, **saved, **{f"ffn_of_{short[key]}": value for key, value in size["ffn_share"].items()}}


def _glue(scores: Any) -> dict[str, Answer]:
    """Accuracy of the split after fine-tuning minus that of the dense model after the same, in points, by model and task."""
    if scores is None:
        why = "no model with a task of kind `classification` is configured; add --configfile config/studies/classification.yaml"
        return {"any": Answer(missing=why)}
    found: dict[str, Answer] = {}
    for row in scores[(scores["method"] == "split") & (scores["measure"] == "accuracy")].to_dict("records"):
        key = f"{row['model']}, {row['evaluation']}"
        if row["recovery"] != "none":
            found[key] = Answer(100 * row["delta_control"], 100 * row["delta_control_se"])
        else:
            found.setdefault(key, Answer(missing="no recovery of kind `finetune` is configured for this model"))
    return found
