from __future__ import annotations

from winnow.planning.stages.base import Stage


class DemoTexts(Stage):
    """The texts of the demo, from the Python installation."""
