from __future__ import annotations

from winnow.evaluation.base import PLAIN
from winnow.io.artifacts import file_digest
from winnow.planning.stages.base import TABLES, TEMPLATES, Stage


class Report(Stage):
    """The report of the losses."""

    libraries = ("jinja2", *TABLES)

    def spec(self, w: dict[str, str]) -> dict[str, str | int]:
        return {"template": file_digest(TEMPLATES / "report.html.j2"), "cells": len(self.plan.cells.of(PLAIN))}
