"""The report: a single HTML file with tables, figures, and the provenance of every number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from winnow.evaluation.spread import is_as_dense, paired, standing, tied
from winnow.io.artifacts import Bundle, read_markup

if TYPE_CHECKING:
    from winnow.evaluation.results import LossResult
    from winnow.io.records import Overlap, StatisticsManifest
    from winnow.io.specs import StudyPage
    from winnow.studies.base import Conclusion, Evidence, Study

TEMPLATES = Path(__file__).parent / "templates"


def render(
    summary: pd.DataFrame,
    spread: pd.DataFrame,
    figures: dict[str, str],
    results: list[LossResult],
    overlaps: list[Overlap],
    moments: Sequence[StatisticsManifest] = (),
) -> str:
    """The page. `figures`: SVG texts; `results`: the evaluations of the summary's rows, in its order; `moments`: the manifests of
    the statistics that cells use."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    groups = []
    for (model, evaluation), rows in summary.groupby(["model", "evaluation"], sort=False):
        position = rows.index[rows["method"] == "dense"][0]
        dense, protocol = rows.loc[position], results[position]
        blocks = []
        for targets, block in rows[rows["method"] != "dense"].groupby("targets", sort=False):
            budgets = [_against_best(cells, results) for _, cells in block.groupby("budget", sort=False)]
            blocks.append((targets, [row for cells in budgets for row in cells]))
        healed = rows[(rows["method"] == "dense") & (rows["recovery"] != "none")].to_dict("records")
        facts = {"model": model, "evaluation": evaluation, "source": protocol, "blocks": blocks}
        groups.append({**facts, "dense": dense.to_dict(), "healed": healed})
    compressed = summary[summary["method"] != "dense"]
    several = [name for name in ("calibration", "recovery") if compressed[name].nunique() > 1]
    template = environment.get_template("report.html.j2")
    several_seeds = spread[spread["seeds"] > 1].sort_values(["model", "evaluation", "budget", "above_best"], kind="stable")
    seeds = []
    for _, cells in several_seeds.groupby(["model", "evaluation", "budget", "calibration", "recovery"], sort=False):
        found: list[dict[str, Any]] = cells.to_dict("records")  # type: ignore[assignment]
        seeds += _marked(found, next(row for row in found if row["method"] == row["best"]))
    inline = {name: _inline(name, svg) for name, svg in figures.items()}
    few = [(*(one["provenance"]["wildcards"][key] for key in ("model", "calibration")), one["few_tokens"]) for one in moments]
    tables = {"groups": groups, "seeds": seeds, "overlaps": overlaps, "few": [row for row in few if row[-1]]}
    return template.render(**tables, several=several, figures=inline)


def render_study(study: Study, conclusion: Conclusion, verdicts: pd.DataFrame, evidence: Evidence, folder: Path) -> str:
    """The page of a study: claims with verdicts, identities, figures (from `folder`) and tables."""
    return _template("study.html.j2").render(
        study=study,
        models=list(evidence.measured),
        claims=verdicts.to_dict("records"),
        identities=conclusion.identities.to_dict("records"),
        figures={name: _inline(name, read_markup(folder / f"{name}.svg")) for name in conclusion.figures},
        tables={name: _rows(table) for name, table in conclusion.tables.items()},
    )


def render_studies(manifests: list[str], described: dict[str, StudyPage], verdicts: Sequence[str]) -> str:
    """The page of all studies, from the manifests of their finished folders and {study: title, reference, tables, figures};
    `verdicts`: all possible verdicts, in the order of the columns.

    Raises InputError if a folder is incomplete."""
    found = []
    for manifest in manifests:
        bundle = Bundle(manifest)
        name, params = bundle.manifest["study"], bundle.manifest["provenance"]["params"]
        own, spec = described[name], params["spec"]
        claims = _table(bundle, "claims")
        texts = ["says", "where", "unit", "measured", "differs", "missing"]
        claims[texts] = claims[texts].astype(object).fillna("")
        identities = _table(bundle, "identities")
        figures = {figure: read_markup(bundle.path(f"{figure}.svg")) for figure in own["figures"]}
        found.append(
            {
                "title": own["title"],
                "reference": own["reference"],
                "name": name,
                "folder": str(bundle.directory),
                "claims": claims.to_dict("records"),
                "counts": claims["verdict"].value_counts().to_dict(),
                "identities": identities.to_dict("records"),
                "residual": float(identities["residual"].max()) if len(identities) else None,
                "figures": {figure: _inline(f"{name}-{figure}", svg) for figure, svg in figures.items()},
                "tables": {table: _rows(_table(bundle, table)) for table in own["tables"]},
                "measured": spec["measured"],
                "rows": [*spec["rows"], *spec.get("scores", [])],
                "versions": ", ".join(f"{package} {version}" for package, version in params["versions"].items()),
            }
        )
    models = list(dict.fromkeys(model for study in found for model in study["measured"]))
    total = sum(len({row["id"] for row in study["claims"]}) for study in found)
    return _template("studies.html.j2").render(studies=found, models=models, claims=total, verdicts=verdicts)


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _shown
    return environment.get_template(name)


def _table(bundle: Bundle, name: str) -> pd.DataFrame:
    """A table of a finished study; a table without rows may have no columns."""
    path = bundle.path(f"{name}.csv")
    return pd.read_csv(path) if path.read_text(encoding="utf-8").strip() else pd.DataFrame()


def _rows(table: pd.DataFrame) -> dict[str, list]:
    return {"columns": list(table.columns), "rows": table.astype(object).to_numpy().tolist()}


def _shown(value: Any) -> str:
    """A value with four digits; a dash if it is missing."""
    if value is None or value != value:
        return "\u2013"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _against_best(cells: pd.DataFrame, results: list[LossResult]) -> list[dict[str, Any]]:
    """The rows of one budget, lowest loss first, each with its paired difference to the first; a tie if 0 is within two
    standard errors of it."""
    cells = cells.sort_values("delta_nll", kind="stable")
    best = results[cells.index[0]]["per_window"]
    rows: list[dict[str, Any]] = []
    for position, row in zip(cells.index.tolist(), cells.to_dict("records"), strict=True):
        above, error = paired(results[position]["per_window"], best)
        rows.append({**row, "above_best": above, "above_best_se": error, "tie": tied(above, error)})  # type: ignore[dict-item]
    return _marked(rows, rows[0])


def _marked(rows: list[dict[str, Any]], best: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one budget with their ranking and a CSS class: `best` (bold), or `tie` (not bold) if the lowest loss is within
    two standard errors of the dense model's."""
    mark = "tie" if is_as_dense(best) else "best"
    lines = standing(rows, best)
    return [{**row, "standing": line, "mark": mark if row["tie"] else ""} for row, line in zip(rows, lines, strict=True)]


def _inline(name: str, svg: str) -> str:
    """An SVG for embedding in HTML: without its XML header, and with unique ids."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
