from __future__ import annotations

from winnow.planning.stages.base import Stage


class CheckOverlap(Stage):
    """That a calibration shares nothing with what is evaluated."""

    libraries = ("numpy",)
    others = ("check_rows",)
