"""The report: a single HTML file with a summary, tables, figures, what was chosen, and the provenance of every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd

from winnow.evaluation.spread import is_as_dense, paired, standing, tied
from winnow.reporting import formats
from winnow.reporting.best import best_by_budget, question
from winnow.reporting.chosen import SHADES, chosen_sizes, dense_bits, labels_of
from winnow.reporting.figures import svg_of
from winnow.reporting.frontier import QUANTITIES, frontier
from winnow.reporting.html import inline, template
from winnow.reporting.times import JobTime, Times, here, total

if TYPE_CHECKING:
    from winnow.evaluation.results import LossResult
    from winnow.io.records import Overlap, StatisticsManifest

MANY = 8  # methods from which on tables are folded and can be filtered
FILTERS = ("perplexity", "with_error", "loss", "duration", "size")  # of `formats`, by which templates show numbers
ROOT = "results/"  # where the report is, and what its links are relative to


def render(
    summary: pd.DataFrame,
    spread: pd.DataFrame,
    figures: dict[str, str],
    results: Mapping[str, LossResult],
    overlaps: Sequence[Overlap],
    moments: Sequence[StatisticsManifest] = (),
    allocations: Sequence[Mapping[str, Any]] = (),
    models: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page. `figures`: the SVG texts of `ranking` and `spectra`; `results`: {path: evaluation} of the summary's rows, in its
    order; `moments`: the manifests of the statistics that cells use; `allocations`: the allocation.json of cells; `models`: the
    manifests of models."""
    measured, times = list(results.values()), Times()
    preset_of = {
        labels_of(one["provenance"])[1].rpartition("-")[0]: one["provenance"]["params"]["spec"]["names"]["calibration"]
        for one in allocations
    }
    cells = [
        {**row, **_links(row, found), "seconds": total(times.behind(f"{row['checkpoint']}/manifest.json"))}
        for row, found in zip(_records(summary), measured, strict=True)
    ]
    best = best_by_budget(spread, summary, preset_of)
    compressed = summary[summary["method"] != "dense"]
    panels = {}  # each quantity by itself, so that a narrow page has them one below the other
    for name in QUANTITIES if len(compressed) else ():
        if compressed[name].notna().any():
            figure = frontier(summary, dense_bits(models), [name])
            panels[name] = svg_of(figure)
            plt.close(figure)
    jobs = frozenset().union(*(times.behind(path) for path in results))
    few = [(*(one["provenance"]["wildcards"][key] for key in ("model", "calibration")), one["few_tokens"]) for one in moments]
    return template("report.html.j2", **{name: getattr(formats, name) for name in FILTERS}).render(
        question=question(summary, measured, allocations, models),
        best=[{**row, **(cells[row["at"]] if row["at"] is not None else {}), **row} for row in best],
        groups=_groups(summary, cells, measured),
        many=compressed["method"].nunique() > MANY,
        several=[name for name in ("calibration", "recovery") if compressed[name].nunique() > 1],
        chosen=chosen_sizes(allocations, models),
        predicted=_predicted(summary, measured, allocations),
        seeds=_seeds(spread),
        few=[row for row in few if row[-1]],
        overlaps=overlaps,
        figures={name: inline(name, svg) for name, svg in (figures | panels).items()},
        shades=[_shade(step / (SHADES - 1)) for step in range(SHADES)],
        stages=_stages(jobs),
        machine=here(),
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")  # type: ignore[return-value]


def _links(row: Mapping[str, Any], result: LossResult) -> dict[str, str]:
    """Paths of a compressed cell's checkpoint, recipe and card, relative to the report; empty for those of a dense model, which
    is where the user has it."""
    wildcards: Mapping[str, str] = result.get("provenance", {}).get("wildcards", {})  # type: ignore[attr-defined]
    if row["method"] == "dense" or not str(row["checkpoint"]).startswith(ROOT):
        return {"folder": "", "recipe": "", "card": ""}
    folder = str(row["checkpoint"]).removeprefix(ROOT)
    card = "/".join(wildcards.get(name, "") for name in ("model", "calibration", "method", "budget", "recovery"))
    return {"folder": f"{folder}/", "recipe": f"{folder}/recipe.yaml", "card": f"{card}/README.md" if wildcards else ""}


def _groups(summary: pd.DataFrame, cells: list[dict[str, Any]], results: list[LossResult]) -> list[dict[str, Any]]:
    """The tables of every model and evaluation: of each targets, of each budget the rows, lowest loss first."""
    groups = []
    for (model, evaluation), rows in summary.groupby(["model", "evaluation"], sort=False):
        position = rows.index[(rows["method"] == "dense") & (rows["recovery"] == "none")][0]
        blocks = []
        for targets, block in rows[rows["method"] != "dense"].groupby("targets", sort=False):
            budgets = block.groupby("budget", sort=False)
            blocks.append((targets, [(budget, _against_best(own.index, cells, results)) for budget, own in budgets]))
        healed = rows[(rows["method"] == "dense") & (rows["recovery"] != "none")]
        facts = {"model": model, "evaluation": evaluation, "source": results[position], "blocks": blocks}
        groups.append({**facts, "dense": cells[position], "healed": _records(healed)})
    return groups


def _against_best(positions: pd.Index, cells: list[dict[str, Any]], results: list[LossResult]) -> list[dict[str, Any]]:
    """The rows of one budget, lowest loss first, each with its paired difference to the first; a tie if 0 is within two
    standard errors of it."""
    order = sorted(positions, key=lambda position: cells[position]["delta_nll"])
    best = results[order[0]]["per_window"]
    rows: list[dict[str, Any]] = []
    for position in order:
        above, error = paired(results[position]["per_window"], best)
        rows.append({**cells[position], "above_best": above, "above_best_se": error, "tie": tied(above, error)})
    kl = [row["kl"] for row in rows if row["kl"] == row["kl"]]
    return [{**row, "least_kl": bool(kl) and row["kl"] == min(kl)} for row in _marked(rows, rows[0])]


def _seeds(spread: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of configurations with several calibration seeds, those of one budget together."""
    several = spread[spread["seeds"] > 1].sort_values(["model", "evaluation", "budget", "above_best"], kind="stable")
    seeds = []
    for _, cells in several.groupby(["model", "evaluation", "budget", "calibration", "recovery"], sort=False):
        found = _records(cells)
        seeds += _marked(found, next(row for row in found if row["method"] == row["best"]))
    return seeds


def _marked(rows: list[dict[str, Any]], best: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one budget with their ranking and a CSS class: `best` (bold), or `tie` (not bold) if the lowest loss is within
    two standard errors of the dense model's."""
    mark = "tie" if is_as_dense(best) else "best"
    lines = []
    for row, line in zip(rows, standing(rows, best), strict=True):
        above, error = float(row["above_best"]), float(row["above_best_se"])
        lines.append(line.replace(f"{above:.4f} ± {error:.4f}", formats.with_error(above, error)))  # the digits of the error
    return [{**row, "standing": line, "mark": mark if row["tie"] else ""} for row, line in zip(rows, lines, strict=True)]


def _predicted(
    summary: pd.DataFrame, results: list[LossResult], allocations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows without recovery whose allocation predicted a loss, with it."""
    known = {labels_of(one["provenance"]): one["predicted"] for one in allocations if "predicted" in one}
    found = []
    for row, result in zip(_records(summary), results, strict=True):
        labels = labels_of(result.get("provenance", {}))  # type: ignore[arg-type]
        if row["recovery"] == "none" and labels in known:
            predicted = known[labels]
            clear = predicted and not is_as_dense(row)
            found.append({**row, "predicted": predicted, "ratio": row["delta_nll"] / predicted if clear else None})
    return found


def _stages(jobs: frozenset[JobTime]) -> list[dict[str, Any]]:
    """What the jobs of each rule took, the longest first."""
    rules: dict[str, list[JobTime]] = {}
    for job in sorted(jobs, key=lambda job: (job.rule, job.labels)):
        rules.setdefault(job.rule, []).append(job)
    rows = []
    for rule, own in rules.items():
        seconds = [job.seconds for job in own if job.seconds is not None]
        facts = {"rule": rule, "jobs": len(own), "unknown": len(own) - len(seconds), "seconds": sum(seconds) if seconds else None}
        memory = max((job.memory for job in own if job.memory is not None), default=None)
        devices = ", ".join(dict.fromkeys(job.device for job in own if job.device))
        rows.append({**facts, "longest": max(seconds, default=None), "memory": memory, "devices": devices})
    return sorted(rows, key=lambda row: (-(row["seconds"] or 0.0), row["rule"]))


def _shade(share: float) -> tuple[str, str]:
    """(background, text colour) of a share of bytes kept, from almost white to dark blue."""
    light, dark = (240, 246, 252), (8, 69, 130)
    mixed = [round(a + (b - a) * share) for a, b in zip(light, dark, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed), "#fff" if share > 0.55 else "#1a1a1a"
