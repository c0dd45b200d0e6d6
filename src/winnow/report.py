"""The report: a single HTML file with tables, figures, and how each number was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from winnow.spread import paired, tied

TEMPLATES = Path(__file__).parent / "templates"


def render(
    summary: pd.DataFrame,
    spread: pd.DataFrame,
    figures: dict[str, str],
    results: list[dict[str, Any]],
    overlaps: list[dict[str, Any]],
) -> str:
    """The page. `figures` are SVG texts, `results` the evaluations behind the summary's rows, in its order."""
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
    seeds = spread[spread["seeds"] > 1].sort_values(["model", "evaluation", "budget", "above_best"], kind="stable")
    inline = {name: _inline(name, svg) for name, svg in figures.items()}
    return template.render(groups=groups, several=several, seeds=seeds.to_dict("records"), figures=inline, overlaps=overlaps)


def _against_best(cells: pd.DataFrame, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one budget, lowest loss first, each with its paired difference to that one; a tie if 0 is within two
    standard errors of it."""
    cells = cells.sort_values("delta_nll", kind="stable")
    best = results[cells.index[0]]["per_window"]
    rows: list[dict[str, Any]] = []
    for position, row in zip(cells.index.tolist(), cells.to_dict("records"), strict=True):
        above, error = paired(results[position]["per_window"], best)
        rows.append({**row, "above_best": above, "above_best_se": error, "tie": tied(above, error)})  # type: ignore[dict-item]
    return rows


def _inline(name: str, svg: str) -> str:
    """An SVG to stand in HTML: without its XML header, and with ids that no other figure has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
