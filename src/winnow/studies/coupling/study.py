"""Study of cross-layer subspace coupling (arXiv 2605.30836): energies of the weights, and their effect on the loss."""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.io.progress import every
from winnow.studies.base import SOLVED, Asked, Conclusion, Evidence, Given, Study, StudyOptions
from winnow.studies.claims import Answer

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from winnow.numerics.coupling import Coupling, Sections
    from winnow.studies.coupling.found import Chained, Errors, Sweep
    from winnow.studies.records import Missing

SHARE = 0.25  # d / D of the paper
STRENGTHS = (0.0, 1e-2, 1e-1, 1.0, 10.0, 1e2, 1e3, 1e4)  # lambda, as a share of the mean squared norm of the maps
WEIGHTS, GRAM, LOW_RANK = {"kind": "weights"}, {"kind": "gram"}, {"kind": "low_rank"}
NAMES = {"coupled": "coupled", "coupled_gram": "coupled, Gram metric", "svd": "SVD", "whitened": "SVD-LLM (whitened)"}
SCORES = ["model", "evaluation", "task", "measure", "method", "budget", "keep_bytes", "documents", "value", "value_se"]
SCORES += ["delta", "delta_se"]
HELLASWAG, MEASURE = "hellaswag", "acc_norm"  # the measure that papers report
NAMES |= {"basis_sharing": "Basis Sharing", "coupled_anchored": "coupled, lambda = 1", "coupled_tied": "coupled, one section"}


class CouplingStudy(Study):
    title = "Cross-layer subspace coupling"
    reference = "arXiv 2605.30836"
    methods = {
        "svd": {"structure": LOW_RANK, "metric": WEIGHTS},
        "whitened": {"structure": LOW_RANK, "metric": GRAM},
        "basis_sharing": {"structure": {"kind": "basis_sharing", "layers": 2}, "metric": GRAM},
        "coupled": {"structure": {"kind": "coupled"}, "metric": WEIGHTS},
        "coupled_tied": {"structure": {"kind": "coupled", "tying": "tied"}, "metric": WEIGHTS},
        "coupled_anchored": {"structure": {"kind": "coupled", "anchor_strength": 1.0}, "metric": GRAM},
        "coupled_gram": {"structure": {"kind": "coupled"}, "metric": GRAM},
    }
    budgets = {
        "o-rank-0.25": {"targets": ["o_proj"], "rank_fraction": SHARE},
        "ffn-rank-0.25": {"targets": ["ffn"], "rank_fraction": SHARE},
        "o-0.344": {"targets": ["o_proj"], "keep_bytes": 0.34375},  # about the bytes of chained sections at a quarter
    }
    cells = [(method, budget) for budget, method in product(("o-rank-0.25", "ffn-rank-0.25"), methods)]
    cells += [("svd", "o-0.344"), ("whitened", "o-0.344")]
    scored = [("coupled", "o-rank-0.25"), ("whitened", "o-rank-0.25"), ("whitened", "o-0.344")]
    scored_by = "accuracy"
    tables = ("sweep", "tying", "errors", "loss", "scores")
    figures = ("sweep", "loss")

    reads = ("moments",)

    class Options(StudyOptions):
        layers: int = Field(12, ge=2, description="layers at most of the chain, from the first on")
        steps: int = Field(60, ge=1, description="updates of every section at most")

    def work(self, asked: Asked) -> tuple[float, float]:
        sides = [m.shape for m in asked.shape.matrices if m.role == "o_proj"][: self.options.layers]
        n = max((max(side) for side in sides), default=0)
        solved = (len(STRENGTHS) + 4) * 2.5 * self.options.steps * (len(sides) + 1)
        return 8.0 * 12 * len(sides) * n**2, SOLVED / 2 * solved * n**3

    def measure(self, given: Given) -> Chained | Missing:
        """Energies over lambda and tying of the o_proj of all layers, errors of other forms on the same scale, identities."""
        import torch

        from winnow.models.architectures import moments_file
        from winnow.numerics.coupling import Coupling, numbering, solve
        from winnow.numerics.linalg import square_root

        files, moments = given.files, given.moments
        assert moments is not None
        matrices = sorted((m for m in files.matrices if m.role == "o_proj"), key=lambda m: m.layer)[: self.options.layers]
        once, steps = given.pieces.once, self.options.steps
        weights = torch.stack([files.weight(m) for m in matrices])
        grams = [moments.tensors(moments_file(m.layer))[f"{m.site}.gram"].double() for m in matrices]
        roots = [square_root(gram) for gram in grams]
        count, (rows, columns) = len(matrices), weights.shape[1:]
        if rows != columns:
            return {"missing": f"o_proj is {rows} x {columns}; chained sections need square matrices"}
        k = max(1, round(SHARE * columns))
        plain = torch.linalg.svd(weights, full_matrices=False)
        lefts = torch.stack([torch.linalg.svd(w @ root).U[:, :k] for w, root in zip(weights, roots, strict=True)])
        scale, total = float(weights.square().sum((1, 2)).mean()), float(weights.square().sum())

        def form(together: int, strength: float, chained: bool = True) -> tuple[Coupling, Sections, Sections]:
            coupling = Coupling(weights, *numbering(count, together, chained))
            anchors = _anchors(coupling, lefts)
            return coupling, solve(coupling, anchors, strength * scale, 2 if strength else 3, steps, 0)[0], anchors

        def point(strength: float) -> Sweep:
            coupling, sections, anchors = form(1, strength)
            distance = math.sqrt(sum(_apart(s, a) for s, a in zip(sections, anchors, strict=True)))
            return {"lambda": strength, "error": float(coupling.errors(sections).sum()) / total, "distance": distance}

        def tied(together: int) -> float:
            coupling, sections, _ = form(together, 0.0)
            return float(coupling.errors(sections).sum()) / total

        sweep: list[Sweep] = [once(f"lambda {s}", partial(point, s)) for s in every(STRENGTHS, "strengths")]
        ways = {"free": 1, "pairs": 2, "one section": count + 1}
        tying = {name: once(name, partial(tied, ways[name])) for name in every(list(ways), "ways of tying")}
        coupling, free, anchors = form(1, 0.0)
        whitened = [left @ (left.T @ w) for w, left in zip(weights, lefts, strict=True)]
        bound = plain.S[:, k:].square().sum(1)
        kept = {
            "coupled": _projected(coupling, free),
            "SVD-LLM in chained sections": _projected(coupling, anchors),
            "SVD-LLM": torch.stack(whitened),
            "Basis Sharing": _shared(weights, grams, k),
            "SVD": plain.U[:, :, :k] @ (plain.S[:, :k, None] * plain.Vh[:, :k]),
        }
        errors: dict[str, Errors] = {}
        for name, approximation in kept.items():
            lost = weights - approximation
            seen = sum(float((part @ root).square().sum()) for part, root in zip(lost, roots, strict=True))
            whole = sum(float((w @ root).square().sum()) for w, root in zip(weights, roots, strict=True))
            errors[name] = {"weights": float(lost.square().sum()) / total, "outputs": seen / whole}
        numbers = {"coupled": (count + 1) * k * columns + count * k * k, "SVD-LLM": 2 * count * k * columns}
        return {
            "layers": count,
            "width": columns,
            "k": k,
            "sweep": sweep,
            "anchors_error": float(coupling.errors(anchors).sum()) / total,
            "tying": tying,
            "errors": errors,
            "stored": {name: n / (count * rows * columns) for name, n in numbers.items()},
            "identities": _identities(coupling, free, anchors, bound),
        }

    def conclude(self, evidence: Evidence) -> Conclusion:
        import pandas as pd

        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables if name != "scores"}
        identities: list[dict[str, Any]] = []
        answers: dict[str, dict[str, Answer]] = _hellaswag(evidence)
        measured: dict[str, Chained] = evidence.measured
        for model, found in measured.items():
            for claim, answer in self._answers(evidence, model, found).items():
                answers.setdefault(claim, {})[model] = answer
            for method, budget in self.cells:
                row = evidence.loss(model, method, budget)
                tables["loss"].append({"model": model, "method": method, "budget": budget, **row})
            if "missing" in found:
                continue
            tables["sweep"] += [{"model": model, **row} for row in found["sweep"]]
            tables["tying"] += [{"model": model, "sections": name, "error": value} for name, value in found["tying"].items()]
            tables["errors"] += [{"model": model, "form": form, **row} for form, row in found["errors"].items()]
            identities += [{"model": model, "identity": name, "residual": value} for name, value in found["identities"].items()]
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
        frames["scores"] = pd.DataFrame(columns=SCORES) if evidence.scores is None else evidence.scores[SCORES]
        figures = {"sweep": _sweep_figure(frames["sweep"], evidence.measured), "loss": _loss_figure(frames["loss"])}
        return Conclusion(frames, figures, answers, pd.DataFrame(identities))

    def _answers(self, evidence: Evidence, model: str, found: Chained) -> dict[str, Answer]:
        gap = evidence.above(model, ("coupled", "o-rank-0.25"), ("whitened", "o-rank-0.25"))
        bytes_gap = evidence.above(model, ("coupled", "o-rank-0.25"), ("whitened", "o-0.344"))
        culprit = evidence.above(model, ("coupled_gram", "o-rank-0.25"), ("coupled", "o-rank-0.25"))
        left = evidence.above(model, ("coupled_gram", "o-rank-0.25"), ("whitened", "o-rank-0.25"))
        answers = {
            "coupling_loss": Answer(*gap),
            "coupling_loss_equal_bytes": Answer(*bytes_gap),
            "coupling_metric": Answer(*culprit),
            "coupling_metric_peer": Answer(*left),
        }
        named = ("coupling_optimum", "coupling_rate", "coupling_error", "coupling_against_sharing", "coupling_bytes")
        if "missing" in found:
            return answers | {name: Answer(missing=found["missing"]) for name in (*named, "coupling_against_svd")}
        sweep, errors = found["sweep"], {name: row["weights"] for name, row in found["errors"].items()}
        far, near = sweep[-1], sweep[-2]
        rate = math.log(far["distance"] / near["distance"]) / math.log(far["lambda"] / near["lambda"])
        values = (
            sweep[0]["error"] - min(row["error"] for row in sweep[1:]),
            rate,
            100 * (errors["coupled"] / found["anchors_error"] - 1),
            100 * (errors["coupled"] / errors["Basis Sharing"] - 1),
            100 * (found["stored"]["coupled"] / found["stored"]["SVD-LLM"] - 1),
            100 * (errors["coupled"] / errors["SVD"] - 1),
        )
        return answers | dict(zip((*named, "coupling_against_svd"), map(Answer, values), strict=True))


def _hellaswag(evidence: Evidence) -> dict[str, dict[str, Answer]]:
    """HellaSwag accuracy of coupled sections minus that of whitened SVD, in points, at the same rank and at about the same bytes,
    paired by document, by model and evaluation."""
    import numpy as np

    from winnow.evaluation.spread import ratio

    right: dict[str, dict[tuple[str, str], Any]] = {}
    for row in evidence.scored:
        if task := evidence.results[row["result"]]["scores"].get(HELLASWAG):
            own = right.setdefault(f"{row['model']}, {row['evaluation']}", {})
            own[row["method"], row["budget"]] = task[MEASURE]["per_document"]
    missing = Answer(missing="no evaluation of HellaSwag is configured; add --configfile config/studies/accuracy.yaml")
    found: dict[str, dict[str, Answer]] = {}
    for claim, budget in {"coupling_hellaswag": "o-rank-0.25", "coupling_hellaswag_equal_bytes": "o-0.344"}.items():
        found[claim] = {} if right else {"any": missing}
        for place, own in right.items():
            points = np.subtract(own["coupled", "o-rank-0.25"], own["whitened", budget])
            mean, error = ratio(points.tolist(), [1.0] * len(points))
            found[claim][place] = Answer(100 * mean, 100 * error)
    return found


def _anchors(coupling: Coupling, lefts: Tensor) -> Sections:
    from winnow.numerics.coupling import anchors_of

    return anchors_of(coupling, lefts, "both")


def _apart(one: Tensor, other: Tensor) -> float:
    """||P - P'||^2 of the projectors onto two sections (d, k)."""
    return float((one @ one.T - other @ other.T).square().sum())


def _projected(coupling: Coupling, sections: Sections) -> Tensor:
    """P_{l+1} W_l P_l (L, m, n)."""
    import torch

    pairs = zip(coupling.inputs, coupling.outputs, strict=True)
    return torch.stack([sections[o] @ coupling.core(i, sections) @ sections[p].T for i, (p, o) in enumerate(pairs)])


def _shared(weights: Tensor, grams: list[Tensor], k: int) -> Tensor:
    """Basis Sharing of two layers with k directions, in their mean metric: W_l C^{1/2} is projected onto the shared right
    singular vectors, and transformed back."""
    import torch

    from winnow.numerics.linalg import square_root

    found = []
    for start in range(0, len(weights), 2):
        group = range(start, min(start + 2, len(weights)))
        root = square_root(torch.stack([grams[i] for i in group]).mean(0))
        basis = torch.linalg.svd(torch.cat([weights[i] @ root for i in group])).Vh[:k]
        found += [torch.linalg.lstsq(root.T, (weights[i] @ root @ basis.T @ basis).T).solution.T for i in group]
    return torch.stack(found)


def _identities(coupling: Coupling, sections: Sections, anchors: Sections, bound: Tensor) -> dict[str, float]:
    """Residuals, relative to the squared norms, of exact identities; the last is a bound, whose excess is at most 0."""
    import torch

    kept, total = _projected(coupling, sections), float(coupling.maps.square().sum())
    direct = (coupling.maps - kept).square().sum((1, 2))
    angles = torch.linalg.svdvals(sections[0].T @ anchors[0]).clamp(max=1).arccos()
    turned = [s @ torch.linalg.qr(torch.ones(s.shape[1], s.shape[1]).double().tril()).Q for s in sections]
    return {
        "E_l = ||W_l||^2 - ||P_{l+1} W_l P_l||^2": float((direct - coupling.errors(sections)).abs().max()) / total,
        "||P - P'||^2 = 2 sum sin^2 of the principal angles": abs(
            _apart(sections[0], anchors[0]) - 2 * float(angles.sin().square().sum())
        )
        / sections[0].shape[1],
        "E is the same for S Q, Q orthogonal": float((coupling.errors(turned) - direct).abs().max()) / total,
        "E_l >= sum of the squared singular values beyond k": float((bound - direct).max()) / total,
    }


def _sweep_figure(sweep: pd.DataFrame, measured: dict[str, Chained]) -> Any:
    from winnow.reporting.figures import axes_grid, line_style

    models = list(sweep["model"].unique()) if len(sweep) else []
    figure, axes = axes_grid(max(1, len(models)))
    for axis, model in zip(axes, models, strict=False):
        rows, found = sweep[sweep["model"] == model], measured[model]
        shown = rows[rows["lambda"] > 0]
        axis.plot(shown["lambda"], shown["error"], label="coupled", markersize=4, linewidth=1.2, **line_style(0))
        lines = {"coupled, lambda = 0": rows["error"].iloc[0], "SVD-LLM in chained sections": found["anchors_error"]}
        lines |= {name: found["errors"][name]["weights"] for name in ("Basis Sharing", "SVD")}
        for i, (name, value) in enumerate(lines.items()):
            axis.axhline(value, label=name, linewidth=1.0, **{**line_style(i + 1), "marker": None})
        axis.set_xscale("log")
        axis.set_title(f"{model}: o_proj of {found['layers']} layers, d/D = {SHARE}", fontsize=9)
        axis.set_xlabel("anchor strength lambda\n(share of the mean squared norm)", fontsize=8)
        axis.set_ylabel("squared error of the weights (share)")
    return _labelled(figure, axes)


def _loss_figure(loss: pd.DataFrame) -> Any:
    from winnow.reporting.figures import axes_grid, line_style, span

    cells = list(loss.groupby(["model", "budget"], sort=False))
    figure, axes = axes_grid(len(cells), 4.2, 2.2)
    for axis, ((model, budget), rows) in zip(axes, cells, strict=True):
        rows = rows.sort_values("delta_nll", ascending=False).reset_index(drop=True)
        style = {**line_style(0), "linestyle": "none"}
        axis.errorbar(rows["delta_nll"], rows.index, xerr=2 * rows["delta_nll_se"], markersize=4, capsize=2, **style)
        axis.set_yticks(rows.index, [NAMES[name] for name in rows["method"]], fontsize=7)
        axis.grid(axis="x", linewidth=0.4, color="0.85")
        axis.set_title(f"{model}: {budget}, {span(rows['keep_bytes'])} of the bytes", fontsize=8)
        axis.set_xlabel("loss above dense (nats per token)\nbars: 2 standard errors", fontsize=8)
    return figure


def _labelled(figure: Any, axes: list[Any]) -> Any:
    from winnow.reporting.figures import shared_legend

    shared_legend(figure, axes)
    return figure
