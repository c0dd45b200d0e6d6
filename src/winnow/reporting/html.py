"""Pages of one HTML file each: what they have in common, and those of studies."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from winnow.io.artifacts import Bundle, read_markup

if TYPE_CHECKING:
    from winnow.io.specs import StudyPage
    from winnow.studies.base import Conclusion, Evidence, Study

TEMPLATES = Path(__file__).parent / "templates"


def render_study(study: Study, conclusion: Conclusion, verdicts: pd.DataFrame, evidence: Evidence, folder: Path) -> str:
    """The page of a study: claims with verdicts, identities, figures (from `folder`) and tables."""
    return template("study.html.j2").render(
        study=study,
        models=list(evidence.measured),
        claims=verdicts.to_dict("records"),
        identities=conclusion.identities.to_dict("records"),
        figures={name: inline(name, read_markup(folder / f"{name}.svg")) for name in conclusion.figures},
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
                "figures": {figure: inline(f"{name}-{figure}", svg) for figure, svg in figures.items()},
                "tables": {table: _rows(_table(bundle, table)) for table in own["tables"]},
                "measured": spec["measured"],
                "rows": [*spec["rows"], *spec.get("scores", [])],
                "versions": ", ".join(f"{package} {version}" for package, version in params["versions"].items()),
            }
        )
    models = list(dict.fromkeys(model for study in found for model in study["measured"]))
    total = sum(len({row["id"] for row in study["claims"]}) for study in found)
    return template("studies.html.j2").render(studies=found, models=models, claims=total, verdicts=verdicts)


def template(name: str, **filters: Callable[[Any], str]) -> jinja2.Template:
    """A template of this folder, in which `filters` are known besides `number`."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _shown, **filters}
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


def inline(name: str, svg: str) -> str:
    """An SVG for embedding in HTML: without its XML header, and with unique ids."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
