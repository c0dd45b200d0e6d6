from __future__ import annotations

from winnow.planning.stages.base import TABLES, Stage


class Figures(Stage):
    """Figures of the losses."""

    libraries = ("matplotlib", *TABLES)
