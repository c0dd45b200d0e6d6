"""Answers to the claims of the cluster paper, from the study's cells and measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.evaluation.spread import paired, ratio
from winnow.studies.claims import Answer
from winnow.studies.clusters.correlation import jackknife, mean_error, spearman
from winnow.studies.clusters.counts import PUBLISHED, counts, savings

if TYPE_CHECKING:
    from winnow.evaluation.results import PerWindow
    from winnow.studies.base import Evidence
    from winnow.studies.clusters.found import CellErrorsAndLoss, Clustered, Correlation

MEASURES, ABOVE = ("weights", "activations", "blocks", "logits"), "activations above weights"
DENSE, HEALED, LORA = ("dense", "dense"), ("dense", "dense", "lora"), "lora"
TIGHT = "ffn-0.4"  # the budget of the methods before LoRA


def distillation(evidence: Evidence, model: str, starts: Sequence[str], training: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per method, the dense model first: loss above dense before and after LoRA, and above the dense model after the same
    LoRA (nats per token); the closed part of the gap in nats relative to this control, and in raw perplexity (%)."""
    dense, healed = (evidence.windows(model, cell) for cell in (DENSE, HEALED))
    rows = []
    for start in ("dense", *starts):
        before, after = (DENSE, HEALED) if start == "dense" else ((start, TIGHT), (start, TIGHT, LORA))
        a, b = (evidence.windows(model, cell) for cell in (after, before))
        raw = [evidence.cell(model, *cell)["perplexity"] for cell in (before, after)]
        row: dict[str, Any] = {"start": start}
        for name, pair in (("before", (b, dense)), ("after", (a, dense)), ("above_healed", (a, healed))):
            row[name], row[f"{name}_se"] = paired(*pair)
        if start != "dense":
            gap = np.subtract(b["nll"], dense["nll"]).tolist()
            for name, other in (("closed", dense), ("closed_control", healed)):
                left, error = ratio(np.subtract(a["nll"], other["nll"]).tolist(), gap)
                row[name], row[f"{name}_se"] = 100 * (1 - left), 100 * error
            row["closed_raw"], row["closed_raw_se"] = _closed_raw(b, a, dense)
        row |= {"perplexity_before": raw[0], "perplexity_after": raw[1]}
        rows.append(row | {key: training[start][key] for key in ("trained_numbers", "tokens", "best_step") if start in training})
    return rows


def _closed_raw(before: PerWindow, after: PerWindow, dense: PerWindow) -> tuple[float, float]:
    """(closed part of the gap in perplexity in %, its standard error by the jackknife over windows)."""
    nll = np.array([before["nll"], after["nll"], dense["nll"]], dtype=np.float64)
    tokens = np.array([before["tokens"], after["tokens"], dense["tokens"]], dtype=np.float64)

    def closed(windows: list[int]) -> float:
        first, last, base = np.exp(nll[:, windows].sum(1) / tokens[:, windows].sum(1))
        return float(100 * (1 - (last - base) / (first - base)))

    return jackknife(closed, nll.shape[1])


def rank_correlations(cells: list[CellErrorsAndLoss], budgets: Sequence[str]) -> list[Correlation]:
    """Spearman correlations of every error measure with the loss over the methods at each budget, at several budgets (`mean`),
    and over all cells of FFNs together; with standard errors by the jackknife over cells."""
    ffn = [cell for cell in cells if cell["budget"].startswith("ffn")]
    rows: list[Correlation] = [{"budget": "all", **row} for row in _correlations(ffn)]
    by_budget = {budget: _correlations([cell for cell in ffn if cell["budget"] == budget]) for budget in budgets}
    rows += [{"budget": budget, **row} for budget, found in by_budget.items() for row in found]
    for own in zip(*by_budget.values(), strict=True):
        error = math.sqrt(sum(row["spearman_se"] ** 2 for row in own)) / len(own)
        mean, count = sum(row["spearman"] for row in own) / len(own), sum(row["cells"] for row in own)
        rows.append({"budget": "mean", "measure": own[0]["measure"], "cells": count, "spearman": mean, "spearman_se": error})
    return rows


def _correlations(cells: list[Any]) -> list[Correlation]:
    """The rows of some cells: every measure, and the correlation of output errors minus that of weight errors."""

    def rho(measure: str, items: list[int]) -> float:
        return spearman([cells[i][measure] for i in items], [cells[i]["delta_nll"] for i in items])

    def more(items: list[int]) -> float:
        return rho("activations", items) - rho("weights", items)

    statistics: dict[str, Callable[[list[int]], float]] = {measure: partial(rho, measure) for measure in MEASURES}
    rows: list[Correlation] = []
    for name, statistic in (statistics | {ABOVE: more}).items():
        value, error = jackknife(statistic, len(cells))
        rows.append({"measure": name, "cells": len(cells), "spearman": value, "spearman_se": error})
    return rows


def answers_of(
    evidence: Evidence, model: str, found: Clustered, correlations: list[Correlation], healed: list[dict[str, Any]]
) -> dict[str, dict[str, Answer]]:
    """{claim: {model: answer}}; answers from a published model's config are listed under the name of that model."""
    own = _of_losses(evidence, model) | _of_lora(evidence, model, healed)
    if "missing" in found:
        own |= dict.fromkeys(OF_MEASUREMENT, Answer(missing=found["missing"]))
    else:
        own |= _of_reconstruction(found) | _of_columns(found, correlations)
    answers = {claim: {model: answer} for claim, answer in own.items()}
    shares = {f"{name}, from its config": counts(name)["ffn"] / counts(name)["total"] for name in PUBLISHED}
    answers["clusters_ffn_share"] = {name: Answer(low=100 * share, high=100 * share) for name, share in shares.items()}
    low, high = savings("SmolLM2-135M", 512, 4, 0.75)
    answers["clusters_savings"] = {"SmolLM2-135M, from its config": Answer(low=low, high=high)}
    return answers


OF_MEASUREMENT = (
    *("clusters_gain", "clusters_gain_8", "clusters_gain_16", "clusters_gain_noise", "clusters_rank_budget"),
    *("clusters_gain_equal_rank", "clusters_gain_equal_bytes", "clusters_over_random", "clusters_cosine", "clusters_guided"),
    *("clusters_fewer", "clusters_half", "clusters_half_bytes", "clusters_flat", "clusters_near_zero", "clusters_proxy"),
    *("clusters_proxy_activation", "clusters_norm_uncorrelated", "clusters_activation_correlated", "clusters_massive"),
    *("clusters_massive_weights", "clusters_top"),
)


def _of_reconstruction(found: Clustered) -> dict[str, Answer]:
    published = {(r["matrices"], r["clusters"], r["k"]): r for r in found["published"]}
    table: dict[tuple[str, int, float], Any] = {(r["by"], r["clusters"], r["k"]): r for r in found["reconstruction"]}
    mine, norm = published["this model", 4, 0.25], table["norm", 4, 0.25]
    undefined = Answer(missing="one SVD of as many numbers is exact: the matrices are too small")

    def gain(row: Any, key: str) -> Answer:
        return undefined if row[key] is None else Answer(row[key], row[f"{key}_se"])

    def apart(one: tuple[str, int], other: tuple[str, int], key: str) -> Answer:
        a, b = table[(*one, 0.25)], table[(*other, 0.25)]
        if a[key] is None or b[key] is None:
            return undefined
        return Answer(a[key] - b[key], math.hypot(a[f"{key}_se"], b[f"{key}_se"]))

    (error,) = (
        r["weights"] ** 0.5 for r in found["errors"] if (r["method"], r["budget"]) == ("clusters_d_model", "ffn-rank-0.5")
    )
    rank = undefined if norm["equal_rank"] is None else Answer(low=norm["equal_rank"], high=0.0)
    return {
        "clusters_gain": Answer(mine["gain"]),
        "clusters_gain_8": Answer(published["this model", 8, 0.25]["gain"]),
        "clusters_gain_16": Answer(published["this model", 16, 0.25]["gain"]),
        "clusters_gain_noise": Answer(published["noise", 4, 0.25]["gain"]),
        "clusters_rank_budget": Answer(low=mine["rank_ratio"], high=mine["rank_ratio"]),
        "clusters_gain_equal_rank": rank,
        "clusters_gain_equal_bytes": gain(norm, "equal_bytes"),
        "clusters_over_random": gain(norm, "over_random"),
        "clusters_cosine": apart(("cosine", 4), ("norm", 4), "over_random"),
        "clusters_guided": apart(("activation", 4), ("norm", 4), "over_random"),
        "clusters_fewer": apart(("norm", 8), ("norm", 4), "equal_bytes"),
        "clusters_half": Answer(published["this model", 4, 0.5]["gain"]),
        "clusters_half_bytes": Answer(100 * published["this model", 4, 0.5]["stored"]),
        "clusters_flat": Answer(found["flatness"]),
        "clusters_near_zero": Answer(error),
    }


def _of_columns(found: Clustered, correlations: list[Correlation]) -> dict[str, Answer]:
    rho = {r["measure"]: Answer(r["spearman"], r["spearman_se"]) for r in correlations if r["budget"] == "mean"}
    by: dict[str, list[Any]] = {
        name: [r for r in found["massive"] if r["score"] == name] for name in ("activation", "weight norm")
    }
    mean = lambda name, key: Answer(*mean_error([r[key] for r in by[name]]))  # noqa: E731
    return {
        "clusters_proxy": rho["weights"],
        "clusters_proxy_activation": rho[ABOVE],
        "clusters_norm_uncorrelated": mean("weight norm", "left_out"),
        "clusters_activation_correlated": mean("activation", "left_out"),
        "clusters_massive": mean("activation", "massive"),
        "clusters_massive_weights": mean("weight norm", "massive"),
        "clusters_top": mean("activation", "top_share"),
    }


def _of_losses(evidence: Evidence, model: str) -> dict[str, Answer]:
    above = lambda one, other: Answer(*evidence.above(model, one, other))  # noqa: E731
    down, tiers = "down-rank-0.5", ("tiers_activation", "tiers_weight_norm", "tiers_random")
    answers = {
        f"clusters_loss_{share:.2f}".replace("0.", ""): above(("clusters_d_model", f"ffn-rank-{share}"), DENSE)
        for share in (0.25, 0.5, 0.75)
    }
    return answers | {
        "clusters_down": above((tiers[1], down), (tiers[0], down)),
        "clusters_all": above((tiers[1], TIGHT), (tiers[0], TIGHT)),
        "clusters_down_random": above((tiers[0], down), (tiers[2], down)),
        "clusters_peer": above((tiers[0], TIGHT), ("asvd", TIGHT)),
        "clusters_norm_worse": above((tiers[1], TIGHT), ("clusters_norm", TIGHT)),
    }


def _of_lora(evidence: Evidence, model: str, healed: list[dict[str, Any]]) -> dict[str, Answer]:
    rows = {row["start"]: row for row in healed}
    worst, best = rows["tiers_weight_norm"], rows["tiers_activation"]
    starts = [row for row in healed if row["start"] != "dense"]
    first, last = (min(starts, key=lambda row: row[key])["start"] for key in ("before", "after"))
    ends = {name: (name, TIGHT, LORA) for name in (first, last, "tiers_activation", "tiers_weight_norm")}
    return {
        "clusters_lora_raw": Answer(worst["closed_raw"], worst["closed_raw_se"]),
        "clusters_lora_nats": Answer(worst["closed"], worst["closed_se"]),
        "clusters_lora_start": Answer(*evidence.above(model, ends["tiers_activation"], ends["tiers_weight_norm"])),
        "clusters_lora_open": Answer(best["after"], best["after_se"]),
        "clusters_lora_open_control": Answer(best["above_healed"], best["above_healed_se"]),
        "clusters_lora_best": Answer(*evidence.above(model, ends[first], ends[last])),
        "clusters_lora_control": Answer(rows["dense"]["after"], rows["dense"]["after_se"]),
    }
