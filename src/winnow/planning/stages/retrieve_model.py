from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage, source_of

CHECKED = 1 << 22  # numbers of weights that are looked at together

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class RetrieveModel(Stage):
    """The model as it is compressed."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> specs.Source:
        if self.plan.tuned(w["model"]):  # what `finetune` made
            return {"source": f"results/{w['model']}/tuned", "revision": None}
        return source_of(self.plan, w["model"])

    def files(self, w: dict[str, str]) -> dict[str, str]:
        made = self.plan.tuned(w["model"]) or self.plan.dequantized(w["model"])
        return {} if made else self.plan.outside.model(w["model"], "model.json")

    def work(self, load: Load) -> list[Work]:
        return self.needed(load, 1, load.read + 4 * CHECKED, 1e5)
