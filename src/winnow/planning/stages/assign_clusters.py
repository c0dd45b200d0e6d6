from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import TABLES, TORCH, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class AssignClusters(Stage):
    """Clusters of channels."""

    libraries = (*TORCH, *TABLES, "scikit-learn")

    def spec(self, w: dict[str, str]) -> dict[str, specs.Preset]:
        return {"clustering": self.plan.clusterings()[w["clustering"]].model_dump()}

    def work(self, load: Load) -> list[Work]:
        labels = {(of, self.plan.clustering_label(self.plan.labels["methods"][method])) for of, method in load.fits}
        square = 8 * max(3 * m.shape[0] * m.shape[1] + 2 * m.shape[1] ** 2 for m in load.shape.matrices)
        count = sum(label is not None for _, label in labels)
        return self.needed(load, count, square, 1e5)
