from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.evaluation.base import PLAIN
from winnow.io.artifacts import file_digest
from winnow.planning.stages.base import TABLES, TEMPLATES, Stage

if TYPE_CHECKING:
    from winnow.io import specs


class Report(Stage):
    """The report of the losses."""

    libraries = ("jinja2", "matplotlib", *TABLES)

    def spec(self, w: dict[str, str]) -> specs.Report:
        templates = [file_digest(TEMPLATES / f"{name}.html.j2") for name in ("report", "report_parts")]
        return {"template": templates, "cells": len(self.plan.cells.of(PLAIN))}
