"""Study of FFN SVD/PCA with residual bypass (HyperTensor Paper VIII) on top of GRC attention (Paper I)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from winnow.studies.base import SOLVED, Asked, Conclusion, Evidence, Given, Study, StudyOptions, speed, spread
from winnow.studies.bypass.accounting import Ranks
from winnow.studies.claims import Answer

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.studies.bypass.found import Bypassed, Removed
    from winnow.studies.records import TimeRow

KEPT = 256 / 4096  # directions of the bypass, as a share of the width
LLAMA = "Llama-3.1-8B"  # from its config alone
WEIGHTS, GRAM, LOW_RANK, SHARED = {"kind": "weights"}, {"kind": "gram"}, {"kind": "low_rank"}, {"kind": "shared_basis"}
BASE = 6.79  # perplexity of the paper's dense model
TIMED: specs.Timing = {"batches": [1], "prompts": [64], "decode": 16, "repeats": 21, "warm_up": 2}


class Row(NamedTuple):
    """A row of the paper's table: ranks as shares of the width, perplexity, parameters removed (%), and the corresponding cell
    (method, budget)."""

    ranks: Ranks
    perplexity: float
    removed: float
    cell: tuple[str, str]


ROWS = {
    "attention": Row(Ranks(0.25, 0), 7.52, 18, ("grc", "qkv-rank-0.25")),
    "ffn": Row(Ranks(0, 0.5), 7.89, 24, ("grc", "ffn-rank-0.5")),
    "both": Row(Ranks(0.25, 0.5), 8.93, 38, ("grc", "both-rank-0.5")),
    "bypass": Row(Ranks(0.25, 0.5, KEPT), 8.21, 34, ("both_bypass", "both-rank-0.5")),
    "larger": Row(Ranks(0.25, 0.75, KEPT), 7.64, 27, ("both_fixed", "both-rank-0.8125")),
}
# Further cells: other readings of a row, and omitted variants.
BESIDE: dict[tuple[str, str], tuple[str, str]] = {
    ("grc_whitened", "qkv-rank-0.25"): ("attention", "whitened basis"),
    ("svd", "ffn-rank-0.5"): ("ffn", "three SVDs"),
    ("grc_inputs", "ffn-rank-0.5"): ("ffn", "PCA of the inputs"),
    ("whitened", "ffn-rank-0.5"): ("ffn", "three whitened SVDs (SVD-LLM)"),
    ("grc_whitened", "both-rank-0.5"): ("both", "whitened bases"),
    ("grc", "both-rank-0.5625"): ("bypass", "no bypass, rank r + k"),
    ("both_fixed", "both-rank-0.75"): ("larger", "no bypass, rank k"),
}
PUBLISHED = {
    "attention": "shared basis of q, k, v",
    "ffn": "SVD of down, shared basis of gate and up",
    "both": "shared bases, SVD of down",
    "bypass": "r kept apart, shared bases",
    "larger": "rank r + k (the best case)",
}


def _bypass(remainder: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "bypass", "kept_fraction": KEPT, "remainder": remainder, **more}


CLUSTERS: dict[str, Any] = {"kind": "cluster", "clusters": 4}
AT_EQUAL_BYTES = {
    "svd": "SVD",
    "whitened": "whitened SVD (SVD-LLM)",
    "grc": "shared bases",
    "both_bypass": "bypass, rest by shared bases",
    "bypass_svd": "bypass, rest by SVD",
    "bypass_whitened": "bypass, rest by whitened SVD",
    "whitened_bypass": "whitened bypass, rest by SVD",
    "bypass_clusters": "bypass, rest by clusters",
    "bypass_clusters_random": "bypass, rest by random clusters",
}
EQUAL_BYTES = [(method, "both-0.62") for method in ("svd", "whitened", "grc", "both_bypass")]
EQUAL_BYTES += [(method, "ffn-0.6") for method in AT_EQUAL_BYTES]
ALONE = [(method, budget) for method in ("svd", "whitened") for budget in ("down-rank-0.375", "gate-up-rank-0.375")]


class BypassStudy(Study):
    title = "FFN SVD and PCA with residual bypass, on top of GRC attention"
    reference = "HyperTensor Papers I (GRC) and VIII (FFN compression and residual bypass)"
    methods = {
        "svd": {"structure": LOW_RANK, "metric": WEIGHTS},
        "whitened": {"structure": LOW_RANK, "metric": GRAM},
        "grc": {"structure": SHARED, "metric": WEIGHTS},
        "grc_whitened": {"structure": SHARED, "metric": GRAM},
        "grc_inputs": {"structure": {**SHARED, "basis": "inputs"}, "metric": GRAM},
        "both_bypass": {
            "structure": {"kind": "by_target", "parts": {"qkv": SHARED, "ffn": _bypass(SHARED)}},
            "metric": WEIGHTS,
        },
        "both_fixed": {
            "structure": {"kind": "by_target", "parts": {"qkv": SHARED, "ffn": {"kind": "gauge_fixed"}}},
            "metric": WEIGHTS,
        },
        "bypass_svd": {"structure": _bypass(LOW_RANK), "metric": WEIGHTS},
        "bypass_whitened": {"structure": _bypass(LOW_RANK, remainder_metric=GRAM), "metric": WEIGHTS},
        "whitened_bypass": {"structure": _bypass(LOW_RANK, remainder_metric=WEIGHTS), "metric": GRAM},
        "bypass_clusters": {"structure": _bypass({**CLUSTERS, "by": "cosine"}), "metric": WEIGHTS},
        "bypass_clusters_random": {"structure": _bypass({**CLUSTERS, "by": "random"}), "metric": WEIGHTS},
    }
    budgets = {
        "qkv-rank-0.25": {"targets": ["qkv"], "rank_fraction": 0.25},
        "qkv-rank-0.375": {"targets": ["qkv"], "rank_fraction": 0.375},
        "ffn-rank-0.5": {"targets": ["ffn"], "rank_fraction": 0.5},
        **{f"both-rank-{k}": {"rank_fraction": {"qkv": 0.25, "ffn": k}} for k in (0.5, 0.5625, 0.75, 0.8125)},
        "both-0.62": {"targets": ["qkv", "ffn"], "keep_bytes": 0.62},
        "ffn-0.6": {"targets": ["ffn"], "keep_bytes": 0.6},
        "down-rank-0.375": {"targets": ["down_proj"], "rank_fraction": 0.375},
        "gate-up-rank-0.375": {"targets": ["gate_up"], "rank_fraction": 0.375},
    }
    cells = [*(row.cell for row in ROWS.values()), *BESIDE, ("grc", "qkv-rank-0.375"), *EQUAL_BYTES, *ALONE]
    tables = ("rows", "equal_bytes", "alone", "hourglass", "accounting", "ranks", "latency")
    figures = ("rows", "equal_bytes", "ranks", "accounting")

    reads = ("moments",)

    class Options(StudyOptions):
        layers: int = Field(32, ge=1, description="layers at most, evenly spread, whose ranks and identities are measured")

    def work(self, asked: Asked) -> tuple[float, float]:
        svd = SOLVED * sum(max(m.shape) * min(m.shape) ** 2 + 3 * m.shape[1] ** 3 for m in asked.shape.matrices)
        share = min(1.0, self.options.layers / asked.shape.layers)
        return 2 * asked.model, share * 3 * svd

    def measure(self, given: Given) -> Bypassed:
        """Effective ranks and their profiles, stored numbers under every way to count, GRC's numbers, its times compared with
        dense, identities."""
        from winnow.models.architectures import FFN_ROLES, TARGETS
        from winnow.studies.bypass.accounting import dense, parameters, removed
        from winnow.studies.bypass.measures import formula_bytes, grc_numbers, identities
        from winnow.studies.bypass.ranks import hourglasses, profile

        files, moments = given.files, given.moments
        assert moments is not None
        once, kept = given.pieces.once, set(spread(sorted({m.layer for m in files.matrices}), self.options.layers))
        sampled = [m for m in files.matrices if m.layer in kept]
        rows, total = profile(files, moments, sampled, once), parameters(files.tensors)
        roles = [role for role in FFN_ROLES if any(row["role"] == role for row in rows)]
        ffn = dense(m for m in files.matrices if m.role in TARGETS["ffn"])
        return {
            "layers": len({m.layer for m in files.matrices}),
            "ffn_share": 100 * ffn / total,
            "ranks": rows,
            "hourglass": hourglasses(rows, roles),
            "accounting": {name: removed(files.matrices, total, row.ranks) for name, row in ROWS.items()},
            "stored_bytes": {name: formula_bytes(files, ROWS[name].ranks) for name in ("attention", "ffn", "both", "bypass")},
            "grc": once("grc", lambda: grc_numbers(files, sampled)),
            "latency": once("latency", lambda: _latency(given)),
            "identities": once("identities", lambda: identities(files, moments, KEPT, sampled)),
        }

    def conclude(self, evidence: Evidence) -> Conclusion:
        import pandas as pd

        from winnow.studies.bypass import figures

        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables}
        answers, identities = _of_llama(tables["accounting"])
        measured: dict[str, Bypassed] = evidence.measured
        for model, found in measured.items():
            for claim, answer in (_of_model(found) | _of_cells(evidence, model)).items():
                answers.setdefault(claim, {})[model] = answer
            tables["rows"] += _rows(evidence, model)
            tables["equal_bytes"] += [_cell(evidence, model, cell) for cell in EQUAL_BYTES]
            tables["alone"] += [_cell(evidence, model, cell) for cell in ALONE]
            tables["hourglass"] += [{"model": model, **row} for row in found["hourglass"]]
            tables["accounting"] += _counts(model, found["accounting"])
            tables["ranks"] += [{"model": model, **row} for row in found["ranks"]]
            tables["latency"] += [{"model": model, **row} for row in found["latency"]]
            exact = dict(found["identities"])
            if found["stored_bytes"]["both"] is not None:
                exact["bytes stored in rows 1 to 4 are those of the formulas"] = max(
                    abs(evidence.cell(model, *ROWS[name].cell)["stored_bytes"] - expected)
                    for name, expected in found["stored_bytes"].items()
                    if expected is not None
                )
            identities += [{"model": model, "identity": name, "residual": value} for name, value in exact.items()]
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
        drawn = {
            "rows": figures.rows(frames["rows"]),
            "equal_bytes": figures.equal_bytes(frames["equal_bytes"], AT_EQUAL_BYTES),
            "ranks": figures.ranks(frames["ranks"]),
            "accounting": figures.accounting(frames["accounting"], LLAMA),
        }
        return Conclusion(frames, drawn, answers, pd.DataFrame(identities))


def _latency(given: Given) -> list[TimeRow]:
    """Times of the cell of row 1, GRC at k = d / 4, compared with dense."""
    from winnow.checkpoint.loading import load_model
    from winnow.studies.trials import Trial, time_forms

    model = load_model(given.files.verify(), given.dtype, given.device).requires_grad_(False)
    row = ROWS["attention"]
    trial = Trial.of(given.files, given.moments, BypassStudy.methods[row.cell[0]], given.device, ["qkv"])
    form = trial.model(model, trial.of_rank(row.ranks.attention))
    return time_forms(model, {PUBLISHED["attention"]: form}, TIMED, given.device)


def _of_llama(table: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Answer]], list[dict[str, Any]]]:
    """Answers and identities from the paper's numbers and the config of its model; adds to `table`."""
    from winnow.models.architectures import TARGETS, matrices_of
    from winnow.studies.bypass.accounting import LLAMA_8B, dense, llama_tensors, parameters, reachable, removed

    tensors = llama_tensors(LLAMA_8B)
    matrices, total = matrices_of("llama", tensors), parameters(tensors)
    found = {name: removed(matrices, total, row.ranks) for name, row in ROWS.items()}
    table += _counts(LLAMA, found)
    ranges = {f"removed_{name}": reachable(rows) for name, rows in found.items()}
    whole, risen = ROWS["attention"].removed + ROWS["ffn"].removed, ROWS["both"].perplexity - BASE
    recovered = [100 * (ROWS["both"].perplexity - ROWS[name].perplexity) / risen for name in ("bypass", "larger")]
    last = float(LLAMA_8B["num_hidden_layers"] - 1)
    ranges |= {"own_sum": (whole, whole), "own_rise": (risen, risen), "own_layers": (last, last)}
    ranges["own_recovery"] = (recovered[0], recovered[1])
    answers = {f"bypass_{name}": {LLAMA: Answer(low=low, high=high)} for name, (low, high) in ranges.items()}
    answers["bypass_ffn_share"] = {LLAMA: Answer(100 * dense(m for m in matrices if m.role in TARGETS["ffn"]) / total)}
    qkv = [m for m in matrices if m.role in TARGETS["qkv"] and m.layer == 0]
    k, n, outs = LLAMA_8B["hidden_size"] // 4, LLAMA_8B["hidden_size"], sum(m.shape[0] for m in qkv)
    saved = [100 * (1 - k * (n + outs - redundant) / dense(qkv)) for redundant in (0, k)]
    answers["grc_bytes"] = {LLAMA: Answer(low=saved[0], high=saved[1])}
    name = "parameters of Llama-3.1-8B by its config, less 8,030,261,248"
    return answers, [{"model": LLAMA, "identity": name, "residual": float(abs(total - 8_030_261_248))}]


def _of_model(found: Bypassed) -> dict[str, Answer]:
    """Answers from weights and statistics."""
    answers = {"bypass_ffn_share": Answer(found["ffn_share"])}
    few = "its FFNs are experts of a mixture"
    for name in ("k95_qkv", "k95_gate_up", "sinks"):
        value = found["grc"][name]
        answers[f"grc_{name}"] = Answer(missing=few) if value is None else Answer(value)
    answers["grc_full"] = Answer(low=0.0, high=found["grc"]["full"])
    (decoding,) = (row for row in found["latency"] if row["phase"] == "decode")
    answers["grc_speed"] = speed(decoding, 100)
    shares: dict[tuple[str, str], list[float]] = {}
    for row in found["ranks"]:
        kind = {"down_proj": "down", "gate_proj": "gate_up", "up_proj": "gate_up", "gate_up_proj": "gate_up"}.get(row["role"])
        if kind:
            shares.setdefault((kind, row["metric"]), []).append(100 * row["k95"])
    mean = {key: sum(values) / len(values) for key, values in shares.items()}
    named = ("bypass_rank_down", "bypass_rank_gate_up", "bypass_rank_ratio_weights", "bypass_rank_ratio_outputs")
    if not mean:
        return answers | dict.fromkeys((*named, *HOURGLASS), Answer(missing=few))
    ratios = [100 * (mean["down", metric] / mean["gate_up", metric] - 1) for metric in ("weights", "outputs")]
    answers |= dict(zip(named, map(Answer, (mean["down", "weights"], mean["gate_up", "weights"], *ratios)), strict=True))
    whole = [row for row in found["hourglass"] if row["role"] == "ffn"]
    if not whole:
        return answers | dict.fromkeys(HOURGLASS, Answer(missing=f"{found['layers']} layers have no early, middle and late part"))
    least = {metric: min(row["excess"] for row in whole if row["metric"] == metric) for metric in ("weights", "outputs")}
    chance = max(row["chance"] for row in whole)
    return answers | dict(zip(HOURGLASS, map(Answer, (least["weights"], least["outputs"], chance)), strict=True))


HOURGLASS = ("bypass_hourglass_weights", "bypass_hourglass_outputs", "bypass_hourglass_chance")


def _of_cells(evidence: Evidence, model: str) -> dict[str, Answer]:
    """Answers from losses."""

    def loss(cell: tuple[str, str]) -> Answer:
        row = evidence.cell(model, *cell)
        return Answer(row["delta_nll"], row["delta_nll_se"])

    def above(one: str, other: str, budget: str) -> Answer:
        return Answer(*evidence.above(model, (one, budget), (other, budget)))

    answers = {f"bypass_loss_{name}": loss(row.cell) for name, row in ROWS.items()}
    answers |= {"grc_loss_1024": loss(ROWS["attention"].cell), "grc_loss_1536": loss(("grc", "qkv-rank-0.375"))}
    answers |= {
        "bypass_headline": loss(("both_bypass", "both-0.62")),
        "bypass_calibration": above("grc", "whitened", "both-0.62"),
        "grc_calibration": above("grc", "grc_whitened", "qkv-rank-0.25"),
        "bypass_against_shared": above("both_bypass", "grc", "both-0.62"),
        "bypass_against_rank": above("bypass_svd", "svd", "ffn-0.6"),
        "bypass_shared_rest": above("both_bypass", "svd", "ffn-0.6"),
        "bypass_whitened_rest": above("bypass_whitened", "whitened", "ffn-0.6"),
        "whitened_bypass_rest": above("whitened_bypass", "whitened", "ffn-0.6"),
        "bypass_clusters_rest": above("bypass_clusters", "svd", "ffn-0.6"),
        "bypass_clusters_control": above("bypass_clusters", "bypass_clusters_random", "ffn-0.6"),
    }
    share, error = _ratio(evidence, model, ("both_bypass", "both-0.62"), ("grc", "both-0.62"))
    answers["bypass_recovery"] = Answer(100 * (1 - share), 100 * error)
    for method, name in (("svd", "weights"), ("whitened", "outputs")):
        cells = [(method, budget) for budget in ("down-rank-0.375", "gate-up-rank-0.375")]
        share, error = _ratio(evidence, model, cells[0], cells[1])
        saved = [row["dense_bytes"] - row["stored_bytes"] for row in (evidence.cell(model, *cell) for cell in cells)]
        bytes_of = saved[1] / saved[0]
        answers[f"bypass_cost_ratio_{name}"] = Answer(100 * (share * bytes_of - 1), 100 * error * bytes_of)
    return answers


def _ratio(evidence: Evidence, model: str, one: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
    """(ratio of the losses above dense of two cells, its standard error), by window."""
    from winnow.evaluation.spread import ratio

    nll = [
        evidence.results[evidence.cell(model, *cell)["result"]]["per_window"]["nll"] for cell in (("dense", "dense"), one, other)
    ]
    above = [[a - b for a, b in zip(losses, nll[0], strict=True)] for losses in nll[1:]]
    return ratio(above[0], above[1])


def _rows(evidence: Evidence, model: str) -> list[dict[str, Any]]:
    """The five-row table: as published, and the further cells of every row."""
    found = []
    for name, (ranks, perplexity, removed, cell) in ROWS.items():
        entries = [(PUBLISHED[name], cell), *((form, other) for other, (row, form) in BESIDE.items() if row == name)]
        for form, (method, budget) in entries:
            row = evidence.cell(model, method, budget)
            gone = 100 * (1 - row["model_stored_bytes"] / row["model_dense_bytes"])
            own = {"model": model, "row": name, "form": form, "k_attention": ranks.attention, "k_ffn": ranks.ffn, "r": ranks.kept}
            own |= evidence.loss(model, method, budget)
            own |= {"removed_%": gone}
            paper = {
                "paper_delta_nll": math.log(perplexity / BASE),
                "paper_perplexity": perplexity,
                "paper_removed_%": removed,
            }
            found.append(own | (paper if (method, budget) == cell else dict.fromkeys(paper, math.nan)))
    return found


def _cell(evidence: Evidence, model: str, cell: tuple[str, str]) -> dict[str, Any]:
    return {"model": model, "budget": cell[1], "method": cell[0], **evidence.loss(model, *cell)}


def _counts(model: str, found: dict[str, list[Removed]]) -> list[dict[str, Any]]:
    return [{"model": model, "row": name, "claimed": ROWS[name].removed, **row} for name, rows in found.items() for row in rows]
