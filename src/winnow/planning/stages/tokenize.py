from __future__ import annotations

from typing import TYPE_CHECKING, Any

from winnow.data.tokens import PROTOCOLS
from winnow.evaluation.base import PLAIN
from winnow.planning.stages.base import HUGGING_FACE, OF_STATISTICS, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class Tokenize(Stage):
    """Windows of tokens of a text."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> specs.CalibrationWindows | specs.EvaluationWindows:
        section = "calibrations" if w["windows"] in self.plan.names["calibrations"] else "evaluations"
        preset = self.plan.preset(section, w["windows"])
        spec: Any = {"kind": section, "join": self.plan.config.texts[preset.text].join}
        spec |= preset.model_dump(exclude={"kind", "text", "task", "compare", *OF_STATISTICS})
        if section == "evaluations":
            spec["version"] = PROTOCOLS[preset.protocol].version
        return spec

    def work(self, load: Load) -> list[Work]:
        calibrations = [work for name in load.calibrations for work in self.needed(load, 1, 0, load.tokens(name) * 4)]
        texts = [c for c in load.cells if c.kind == PLAIN and not c.method and not c.recovery]
        return calibrations + self.needed(load, len(texts), 0, len(texts) * 1e6)
