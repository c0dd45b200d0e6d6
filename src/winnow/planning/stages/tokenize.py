from __future__ import annotations

from typing import Any

from winnow.data.tokens import PROTOCOLS
from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, Stage


class Tokenize(Stage):
    """Windows of tokens of a text."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        section = "calibrations" if w["windows"] in self.plan.names["calibrations"] else "evaluations"
        preset = self.plan.preset(section, w["windows"])
        windows = preset.model_dump(exclude={"kind", "text", "task", "compare", *OF_STATISTICS})
        if section == "evaluations":
            windows["version"] = PROTOCOLS[preset.protocol].version
        return {"kind": section, "join": self.plan.config.texts[preset.text].join, **windows}
