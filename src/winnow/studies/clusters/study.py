"""Study of per-cluster column SVD, what ranks columns, and LoRA afterwards (HyperTensor Paper VII)."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from winnow.io.progress import every
from winnow.studies.base import (
    BATCH,
    LENGTH,
    NONE,
    SOLVED,
    Asked,
    Conclusion,
    Evidence,
    Given,
    Study,
    StudyOptions,
    key_of,
    spread,
)
from winnow.studies.clusters.answers import answers_of, distillation, rank_correlations
from winnow.studies.clusters.figures import correlation_figure, distillation_figure, massive_figure, reconstruction_figure

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.io.artifacts import Bundle
    from winnow.models.architectures import Matrix
    from winnow.studies.claims import Answer
    from winnow.studies.clusters.found import CellErrors, Clustered, Comparison, Correlation, Gains, Massive
    from winnow.studies.clusters.reconstruction import Blocks
    from winnow.studies.records import Missing

COUNTS, FRACTIONS = (2, 4, 8), (0.25, 0.5, 0.75)
WAYS = ("norm", "cosine", "activation", "random")
RANDOM_SEEDS = 3  # random clusterings that a gain is compared with
LEFT_OUT = 4  # calibration windows of removing columns
PAPER = (576, 1536)  # d and hidden width of the paper's model, for matrices without structure
WEIGHTS, LOW_RANK = {"kind": "weights"}, {"kind": "low_rank"}
CLUSTERS = {"kind": "cluster", "clusters": 4}
TIERS = {"kind": "tiers", "exact": 8}  # of the demo's 352 neurons as the published 32 of 1,536
EQUAL = ("ffn-0.6", "ffn-0.4")  # budgets in bytes
STARTS = ("svd", "tiers_weight_norm", "tiers_activation", "asvd", "whitened")


class ClustersStudy(Study):
    title = "Per-cluster column SVD, activation weighting and LoRA"
    reference = "HyperTensor Paper VII"
    methods = {
        "svd": {"structure": LOW_RANK, "metric": WEIGHTS},
        "weight_norm": {"structure": LOW_RANK, "metric": {"kind": "weight_norm"}},
        "asvd": {"structure": LOW_RANK, "metric": {"kind": "mean_abs", "alpha": 0.5}},
        "whitened": {"structure": LOW_RANK, "metric": {"kind": "gram"}},
        "clusters_norm": {"structure": {**CLUSTERS, "by": "norm"}, "metric": WEIGHTS},
        "clusters_cosine": {"structure": {**CLUSTERS, "by": "cosine"}, "metric": WEIGHTS},
        "clusters_activation": {"structure": {**CLUSTERS, "by": "activation"}, "metric": WEIGHTS},
        "clusters_random": {"structure": {**CLUSTERS, "by": "random"}, "metric": WEIGHTS},
        "clusters_d_model": {"structure": {**CLUSTERS, "by": "norm", "axis": "d_model"}, "metric": WEIGHTS},
        "tiers_activation": {"structure": {**TIERS, "score": "mean_abs"}, "metric": WEIGHTS},
        "tiers_weight_norm": {"structure": {**TIERS, "score": "weight_norm"}, "metric": WEIGHTS},
        "tiers_random": {"structure": {**TIERS, "score": "random"}, "metric": WEIGHTS},
    }
    budgets = {
        **{f"ffn-{keep}": {"targets": ["ffn"], "keep_bytes": keep} for keep in (0.6, 0.4)},
        **{f"ffn-rank-{share}": {"targets": ["ffn"], "rank_fraction": share} for share in FRACTIONS},
        "down-rank-0.5": {"targets": ["down_proj"], "rank_fraction": 0.5},
    }
    recoveries = {
        # LoRA as published (rank 8, alpha 16, rate 5e-4, 500 windows), with equal weights of next-token loss and distillation:
        # with distillation alone the dense model, being its own teacher, would gain nothing and be no control.
        "lora": {"kind": "distill", "parameters": "lora", "rate": 5e-4, "nll": 1.0, "steps": 250, "batch": 2, "every": 50},
    }
    cells = [
        *((m, b) for b, m in product(EQUAL, methods) if m != "clusters_d_model"),
        *(("clusters_d_model", f"ffn-rank-{share}") for share in FRACTIONS),
        *(("svd", f"ffn-rank-{share}") for share in (0.25, 0.5)),
        *((m, "down-rank-0.5") for m in ("svd", "asvd", "whitened", "tiers_activation", "tiers_weight_norm", "tiers_random")),
        *((m, "ffn-0.4", "lora") for m in STARTS),
    ]
    tables = ("reconstruction", "published", "massive", "errors", "correlations", "loss", "distillation")
    figures = ("reconstruction", "correlations", "massive", "distillation")
    reads = ("moments", "windows", "checkpoints")

    class Options(StudyOptions):
        length: int = LENGTH
        windows: int = Field(8, ge=1, description="calibration windows of the error measures")
        layers: int = Field(8, ge=1, description="layers at most, evenly spread, whose matrices are clustered and lose columns")
        columns: int = Field(
            20, ge=2, description="columns of every such layer without which the loss is measured, one at a time"
        )

    def work(self, asked: Asked) -> tuple[float, float]:
        o, shape = self.options, asked.shape
        layers, length = min(o.layers, shape.layers), min(o.length, asked.calibration[1])
        ffn = [m for m in shape.matrices if m.site.startswith("ffn")]
        svd = SOLVED * sum(max(m.shape) * min(m.shape) ** 2 for m in ffn) / shape.layers
        decomposed = layers * (1 + len(COUNTS) * (len(WAYS) - 1 + RANDOM_SEEDS)) + 3 * 4
        tokens = 2 * asked.checkpoints * o.windows * length + layers * o.columns * LEFT_OUT * length
        memory = 2 * asked.model + 2 * asked.logits(min(BATCH, o.windows * length), 8)
        return memory, svd * decomposed + asked.forward(tokens)

    def measure(self, given: Given) -> Clustered | Missing:
        """Errors of clusters compared with one SVD, outlying columns, errors of the study's checkpoints, training of LoRA."""
        from winnow.models.architectures import ffn_groups, moments_file

        given, once = given.cut(self.options.length), given.pieces.once
        files, moments = given.files, given.moments
        assert moments is not None
        assert given.windows is not None
        groups = ffn_groups([m for m in files.matrices if m.expert is None])
        if not groups:
            return {"missing": "the model has no FFN but mixtures of experts"}
        sampled = spread(groups, self.options.layers)
        statistics = lambda m: {  # noqa: E731
            name.removeprefix(f"{m.site}."): value.double()
            for name, value in moments.tensors(moments_file(m.layer)).items()
            if name.startswith(f"{m.site}.")
        }
        matrices = [m for group in sampled for m in group]
        rows_of = lambda m: _rows_of(_cut(m, files.weight(m), statistics(m)))  # noqa: E731
        cut = [_cut_of(m.shape, once(m.name, partial(rows_of, m))) for m in every(matrices, "matrices")]
        ends = (groups[0], groups[len(groups) // 2], groups[-1])
        errors, massive = self._of_model(given, [group[-1] for group in sampled], statistics)
        return {
            "reconstruction": _table(cut),
            "published": once("published", lambda: _published([[files.weight(m) for m in g] for g in ends])),
            "flatness": _flatness(cut),
            "identities": _identities(sampled[0][0], files.weight(sampled[0][0]), cut),
            "errors": errors,
            "massive": massive,
            "training": {
                method: json.loads(bundle.path("recovery.json").read_text(encoding="utf-8"))
                for (method, _, recovery), bundle in given.checkpoints.items()
                if recovery != NONE
            },
        }

    def _of_model(self, given: Given, downs: list[Matrix], statistics: Any) -> tuple[list[CellErrors], list[Massive]]:
        """(errors of every checkpoint, columns of down that stand out, and the loss without single ones)."""
        import torch

        from winnow.checkpoint.loading import load_model
        from winnow.models.architectures import blocks_of
        from winnow.studies.clusters.correlation import spearman
        from winnow.studies.clusters.proxies import losses_without, matrix_errors, output_errors
        from winnow.studies.clusters.reconstruction import outlying

        files, windows, moments, once = given.files, given.windows, given.moments, given.pieces.once
        assert windows is not None
        assert moments is not None
        dense = load_model(files.verify(), given.dtype, given.device)
        names, shown = list(blocks_of(files.manifest["model_type"], files.tensors).values()), windows[: self.options.windows]
        batch = max(1, BATCH // windows.shape[1])

        def errors_of(bundle: Bundle) -> list[Any]:
            model = load_model(bundle.verify(), given.dtype, given.device)
            return [matrix_errors(files, moments, bundle, model), output_errors(dense, model, names, shown, batch)]

        errors: list[Any] = []
        for key, bundle in every([(k, b) for k, b in given.checkpoints.items() if k[2] == NONE], "checkpoints"):
            of_matrices, of_outputs = once(f"errors {key}", partial(errors_of, bundle))
            errors.append({"method": key[0], "budget": key[1], **of_matrices, **of_outputs})
        massive: list[Massive] = []
        generator = torch.Generator().manual_seed(0)
        for down in every(downs, "layers"):
            scores = {"activation": statistics(down)["mean_abs"], "weight norm": files.weight(down).norm(dim=0)}
            columns = torch.randperm(down.shape[1], generator=generator)[: self.options.columns].sort().values
            without = partial(losses_without, dense, down, columns.tolist(), windows[:LEFT_OUT])
            lost = once(f"without columns {down.layer}", without)
            for name, score in scores.items():
                left_out, width = spearman(score[columns].tolist(), lost), down.shape[1]
                own = outlying(score)
                massive.append({"layer": down.layer, "score": name, "columns": width, **own, "left_out": left_out})
        return errors, massive

    def conclude(self, evidence: Evidence) -> Conclusion:
        import pandas as pd

        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables}
        identities: list[dict[str, Any]] = []
        answers: dict[str, dict[str, Answer]] = {}
        measured: dict[str, Clustered] = evidence.measured
        for model, found in measured.items():
            for method, budget, recovery in map(key_of, self.cells):
                row = evidence.cell(model, method, budget, recovery)
                own = {key: row[key] for key in ("keep_bytes", "delta_nll", "delta_nll_se", "kl", "perplexity")}
                if recovery == NONE:
                    tables["loss"].append({"model": model, "method": method, "budget": budget, **own})
            healed = distillation(evidence, model, STARTS, found.get("training", {}))
            tables["distillation"] += [{"model": model, **row} for row in healed]
            correlations: list[Correlation] = []
            if "missing" not in found:
                tables["reconstruction"] += [{"model": model, **row} for row in found["reconstruction"]]
                tables["published"] += [{"model": model, **row} for row in found["published"]]
                tables["massive"] += [{"model": model, **row} for row in found["massive"]]
                losses = {(r["method"], r["budget"]): r for r in tables["loss"] if r["model"] == model}
                of_cells: list[Any] = [{**row, **losses[row["method"], row["budget"]]} for row in found["errors"]]
                correlations = rank_correlations(of_cells, EQUAL)
                shown = ("model", "method", "budget", "weights", "activations", "blocks", "logits", "delta_nll", "delta_nll_se")
                tables["errors"] += [{key: row[key] for key in shown} for row in of_cells]
                tables["correlations"] += [{"model": model, **row} for row in correlations]
                identities += [{"model": model, "identity": k, "residual": v} for k, v in found["identities"].items()]
            for claim, by_model in answers_of(evidence, model, found, correlations, healed).items():
                answers.setdefault(claim, {}).update(by_model)
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
        figures = {
            "reconstruction": reconstruction_figure(frames["reconstruction"], frames["published"]),
            "correlations": correlation_figure(frames["errors"], EQUAL),
            "massive": massive_figure(frames["massive"]),
            "distillation": distillation_figure(frames["distillation"]),
        }
        return Conclusion(frames, figures, answers, pd.DataFrame(identities))


class Cut(NamedTuple):
    """The singular values of a matrix, and of its clusters by clustering, count and seed."""

    shape: tuple[int, int]
    one: Blocks
    clustered: dict[tuple[str, int, int], Blocks]


def _cut(matrix: Matrix, weight: Tensor, site: dict[str, Tensor]) -> Cut:
    """The singular values of a matrix and of its clusters for every clustering and count; `random` several times."""
    from winnow.calibration.clusters import Clustering, assign
    from winnow.studies.clusters.reconstruction import cluster_blocks

    clustered = {}
    for by, count in product(WAYS, COUNTS):
        for seed in range(RANDOM_SEEDS if by == "random" else 1):
            clustering = Clustering.model_validate({"clusters": count, "by": by, "seed": seed})
            labels = assign(weight, site, clustering, matrix)[0]
            clustered[by, count, seed] = cluster_blocks(weight, labels)
    return Cut(matrix.shape, cluster_blocks(weight), clustered)


def _rows_of(cut: Cut) -> list[Any]:
    """Builtin types for a file: a row per clustering (how, count, seed, shapes, squared singular values), the whole first."""
    rows = {("", 1, 0): cut.one, **cut.clustered}
    return [(*key, blocks.shapes, [energy.tolist() for energy in blocks.energies]) for key, blocks in rows.items()]


def _cut_of(shape: tuple[int, int], rows: list[Any]) -> Cut:
    """The `Cut` of such rows."""
    import torch

    from winnow.studies.clusters.reconstruction import Blocks

    found = {}
    for by, count, seed, shapes, energies in rows:
        values = [torch.tensor(energy, dtype=torch.float64) for energy in energies]
        found[by, count, seed] = Blocks([(m, n) for m, n in shapes], values)
    return Cut(shape, found.pop(("", 1, 0)), found)


def _table(cut: list[Cut]) -> list[Gains]:
    """Gains of clusters over one SVD and over random clusters of the same matrix; means over matrices with standard errors."""
    from winnow.studies.clusters.correlation import mean_error
    from winnow.studies.clusters.reconstruction import gains

    of: dict[tuple[str, int, float], list[dict[str, float] | None]] = {}
    for by, count, share in product(WAYS, COUNTS, FRACTIONS):
        of[by, count, share] = []
        for each in cut:
            k = max(1, int(share * min(each.shape)))
            seeds = [gains(b, each.one, k) for (way, c, _), b in each.clustered.items() if (way, c) == (by, count)]
            known = [g for g in seeds if g is not None]
            mean = {key: sum(g[key] for g in known) / len(known) for key in known[0]} if len(known) == len(seeds) else None
            of[by, count, share].append(mean)
    rows: list[Gains] = []
    for (by, count, share), found in of.items():
        row: Any = {"by": by, "clusters": count, "k": share}
        pairs = [(g, r) for g, r in zip(found, of["random", count, share], strict=True) if g is not None and r is not None]
        row |= {"matrices": len(pairs), "stored": mean_error([g["stored"] for g, _ in pairs])[0] if pairs else None}
        for key in ("equal_rank", "equal_bytes", "gauge_fixed"):
            row[key], row[f"{key}_se"] = mean_error([g[key] for g, _ in pairs]) if pairs else (None, None)
        over = mean_error([g["equal_bytes"] - r["equal_bytes"] for g, r in pairs]) if pairs else (None, None)
        rows.append(row | {"over_random": over[0], "over_random_se": over[1]})
    return rows


def _published(layers: list[list[Tensor]], shape: tuple[int, int] = PAPER) -> list[Comparison]:
    """The paper's comparison on the FFNs of some layers, and on unstructured matrices of the paper's shape."""
    from winnow.studies.clusters.reconstruction import cluster_blocks, norm_bins, published_comparison, structureless

    rows: list[Any] = []
    for name, ffns in {"this model": layers, **{kind: [structureless(kind, *shape)] for kind in ("noise", "flat")}}.items():
        one = [[cluster_blocks(w) for w in ffn] for ffn in ffns]
        for count in (4, 8, 16):
            labels = [norm_bins(ffn[0], count) for ffn in ffns]
            many = [[cluster_blocks(w, own, w is ffn[-1]) for w in ffn] for ffn, own in zip(ffns, labels, strict=True)]
            for share in FRACTIONS:
                found = [published_comparison(*pair, share) for pair in zip(one, many, strict=True)]
                mean = {key: sum(row[key] for row in found) / len(found) for key in found[0]}
                if mean["global"] > 0:
                    mean["gain"] = 100 * (1 - mean["cluster"] / mean["global"])  # from the mean errors, as in the paper
                rows.append({"matrices": name, "clusters": count, "k": share, **mean})
    return rows


def _flatness(cut: list[Cut]) -> float:
    """The share of directions with 95 % of the squared norm, mean over the matrices."""
    shares = []
    for each in cut:
        (energy,) = each.one.energies
        shares.append(float((energy.cumsum(0) < 0.95 * energy.sum()).sum() + 1) / len(energy))
    return sum(shares) / len(shares)


def _identities(matrix: Matrix, weight: Tensor, cut: list[Cut]) -> dict[str, float]:
    """Residuals, relative to the squared norm, of exact identities; the first is a bound, whose excess is at most 0."""
    import torch

    from winnow.metrics.base import METRICS
    from winnow.structures.base import STRUCTURES, Problem
    from winnow.studies.clusters.reconstruction import cluster_blocks, gains

    excess = [
        found["excess"]
        for each, share in product(cut, FRACTIONS)
        for blocks in each.clustered.values()
        if (found := gains(blocks, each.one, max(1, int(share * min(each.shape)))))
    ]
    structure = STRUCTURES.build({"kind": "cluster", "clusters": 1})
    labels = torch.zeros(weight.shape[1], dtype=torch.int64)
    problem = Problem([matrix], {matrix.name: weight}, {}, METRICS.build(WEIGHTS), labels={matrix.name: labels})
    k = max(1, min(weight.shape) // 4)
    one = float(structure.fit(problem, k).error[k] / weight.square().sum())
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    halves = torch.arange(weight.shape[1]) % 2
    parts = [cluster_blocks(weight, halves), cluster_blocks(weight[:, order], halves[order])]
    lost = [part.lost([k / 2, k / 2]) for part in parts]
    return {
        "||W - W_clusters||^2 >= ||W - W_k||^2 at equal total rank": max(excess, default=0.0),
        "one cluster is the truncated SVD": abs(one - cluster_blocks(weight).lost([float(k)])),
        "the order of the columns changes nothing": abs(lost[0] - lost[1]),
    }
