from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.io.artifacts import file_digest
from winnow.planning.stages.base import TABLES, TEMPLATES, Stage
from winnow.studies.base import study_of

if TYPE_CHECKING:
    from winnow.io import specs


class Studies(Stage):
    """The page of all papers."""

    libraries = ("jinja2", *TABLES)

    def spec(self, w: dict[str, str]) -> specs.Studies:
        """What the page of all papers says of each study that its folder does not hold."""
        all_of = {name: study_of(name) for name in self.plan.of_studies}
        described: dict[str, specs.StudyPage] = {
            name: {"title": of.title, "reference": of.reference, "tables": of.tables, "figures": of.figures}
            for name, of in all_of.items()
        }
        return {"studies": described, "template": [file_digest(TEMPLATES / f"{name}.html.j2") for name in ("studies", "parts")]}
