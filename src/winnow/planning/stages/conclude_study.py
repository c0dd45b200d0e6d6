from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.io.artifacts import file_digest
from winnow.planning.stages.base import TABLES, TEMPLATES, Stage
from winnow.studies.base import STUDIES
from winnow.studies.claims import read_claims

if TYPE_CHECKING:
    from winnow.io import specs

CLAIMS = Path("resources/claims.yaml")


class ConcludeStudy(Stage):
    """Tables, figures and verdicts of a study."""

    libraries = ("matplotlib", "jinja2", *TABLES)

    def spec(self, w: dict[str, str]) -> specs.ConcludeStudy:
        """The claims, the rows of the study's cells under its own names of presets, and {model: measurement}."""
        plan, study = self.plan, w["study"]
        return {
            "claims": [c.model_dump() for c in read_claims(plan.code.root / CLAIMS) if c.study == study],
            "rows": [{**plan.row(cell), **own} for cell, own in plan.studies.of(study)],
            "scores": [{**plan.row(cell), **own} for cell, own in plan.studies.scores(study)],
            "measured": {model: plan.paths.measurement(study, cell) for model, cell in plan.studies.models().items()},
            "template": [file_digest(TEMPLATES / f"{name}.html.j2") for name in ("study", "parts")],
        }

    def code(self, w: dict[str, str]) -> list[str]:
        return [STUDIES.module(w["study"])]
