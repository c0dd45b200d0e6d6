"""The report: a single HTML file with tables, figures, and how each number was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

TEMPLATES = Path(__file__).parent / "templates"


def render(summary: pd.DataFrame, figures: dict[str, str], results: list[dict[str, Any]], overlaps: list[dict[str, Any]]) -> str:
    """The page. `figures` are SVG texts, `results` the evaluations behind the summary's rows, in its order."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    groups = []
    for (model, evaluation), rows in summary.groupby(["model", "evaluation"], sort=False):
        position = rows.index[rows["method"] == "dense"][0]
        dense, protocol = rows.loc[position], results[position]
        blocks = []
        for targets, block in rows[rows["method"] != "dense"].groupby("targets", sort=False):
            best = block.loc[block.groupby("budget")["delta_nll"].idxmin()].index
            blocks.append((targets, block.assign(best=block.index.isin(best)).to_dict("records")))
        groups.append({"model": model, "evaluation": evaluation, "dense": dense.to_dict(), "source": protocol, "blocks": blocks})
    template = environment.get_template("report.html.j2")
    return template.render(groups=groups, figures={k: _inline(k, v) for k, v in figures.items()}, overlaps=overlaps)


def _inline(name: str, svg: str) -> str:
    """An SVG to stand in HTML: without its XML header, and with ids that no other figure has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
