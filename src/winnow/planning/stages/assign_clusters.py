from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import TABLES, TORCH, Stage


class AssignClusters(Stage):
    """Clusters of channels."""

    libraries = (*TORCH, *TABLES, "scikit-learn")

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return {"clustering": self.plan.clusterings()[w["clustering"]].model_dump()}
