from __future__ import annotations

from typing import Any

from winnow.planning.stages.base import TORCH, Stage


class Factorize(Stage):
    """Factors of a method, at every size."""

    libraries = TORCH

    def spec(self, w: dict[str, str]) -> dict[str, Any]:
        return {"method": self.method(w), "shard": w["shard"]}

    def code(self, w: dict[str, str]) -> list[str]:
        return [*super().code(w), *self.plan.metrics_of(w["method"])]
