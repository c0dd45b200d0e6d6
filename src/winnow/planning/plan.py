"""From the grid to stages: what the result of every stage depends on, besides its input files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from winnow.io.records import Params, Row
from winnow.metrics.base import METRICS
from winnow.planning.cells import Cell, Cells
from winnow.planning.config import Config
from winnow.planning.fingerprints import CodeTracker, versions
from winnow.planning.labels import Labels
from winnow.planning.outside import Outside
from winnow.planning.paths import Paths
from winnow.planning.stages.base import stages_of
from winnow.planning.study_cells import StudyCells
from winnow.structures.base import STRUCTURES


def _kinds(content: dict[str, Any]) -> list[str]:
    """All kinds in a resolved preset, nested ones too, each once."""
    parts = [part for value in content.values() for part in (value if isinstance(value, list) else [value])]
    inner = [kind for part in parts if isinstance(part, dict) for kind in _kinds(part)]
    return list(dict.fromkeys([*([content["kind"]] if "kind" in content else []), *inner]))


class Plan(Labels):
    """Cells and stages of a validated configuration; knows nothing of Snakemake and starts no job."""

    def __init__(
        self, config: Config, root: Path, memory: Path | None = None, resources: Mapping[str, Mapping[str, int]] | None = None
    ):
        """`root`: the checkout, whose code is tracked; `memory`: a folder where digests of code are kept; `resources`: what a run
        sets for rules by `--set-resources`, for forecasts."""
        super().__init__(config)
        self.cells = Cells(self)
        self.paths = Paths(self, self.cells)
        self.studies = StudyCells(self, self.paths)
        self.code = CodeTracker(root, memory)
        self.resources = resources or {}
        self.outside = Outside(self)
        self.stages = stages_of(self)
        self.stage_of_rule = {rule: stage.name for stage in self.stages.values() for rule in stage.rules}

    @cached_property
    def export_dtypes(self) -> dict[str, str]:
        """{manifest of a dense export: the dtype that it is asked for in}"""
        asked = [e for e in self.config.experiments.values() if e.export == "dense"]
        return {self.paths.made(cell, "dense_export"): e.export_dtype for e in asked for cell in self.cells.asked(e)}

    def params(self, stage: str, wildcards: dict[str, str]) -> Params:
        """All that a stage is recorded with, besides its input files."""
        return {
            "spec": self.spec(stage, wildcards),
            "code": self.fingerprint(stage, wildcards),
            "versions": self.versions(stage, wildcards),
            "files": self.files(stage, wildcards),
        }

    def spec(self, stage: str, wildcards: dict[str, str]) -> dict[str, Any]:
        """The parameters of a stage: builtin types only, keys sorted."""
        return json.loads(json.dumps(self.stages[stage].spec(wildcards), sort_keys=True))

    def fingerprint(self, stage: str, wildcards: dict[str, str]) -> list[str]:
        """Digests of the stage's script and of every project module that it reaches."""
        found = self.stages[stage]
        return list(self.code.fingerprint(f"{found.kind()}.py", *found.code(wildcards)))

    def versions(self, stage: str, wildcards: dict[str, str]) -> dict[str, str]:
        """Versions of the libraries that a job uses. Raises InputError for one that is not installed."""
        found = self.stages[stage]
        return versions(*found.libraries, *found.uses(wildcards))

    def files(self, stage: str, wildcards: dict[str, str]) -> dict[str, str]:
        """{file that no rule makes and that a job reads: SHA-256 of its content now}"""
        return self.stages[stage].files(wildcards)

    @cache  # noqa: B019 - one plan lives as long as the process, and thousands of cells share a method
    def _kinds_of(self, method: str) -> list[str]:
        return _kinds(self.preset("methods", method).model_dump())

    @cache  # noqa: B019
    def structures_of(self, method: str) -> list[str]:
        """The modules of a method's structures, by its label."""
        return [STRUCTURES.module(kind) for kind in self._kinds_of(method) if kind in STRUCTURES]

    @cache  # noqa: B019
    def metrics_of(self, method: str) -> list[str]:
        """The modules of a method's metrics, by its label."""
        return [METRICS.module(kind) for kind in self._kinds_of(method) if kind in METRICS]

    def row(self, cell: Cell) -> Row:
        """What a table says of a cell before anything is measured."""
        method = self.config.methods[cell.method] if cell.method else None
        budget = self.config.budgets[cell.budget] if cell.budget else None
        return {
            "model": cell.model,
            "calibration": cell.calibration or "none",
            "seeds_of": self.preset_of_seed[cell.calibration] if cell.calibration else "none",
            "seed": self.config.calibrations[cell.calibration].seed if cell.calibration else None,
            "method": cell.method or "dense",
            "structure": method.structure.kind if method else "dense",
            "metric": method.objective if method else "none",
            "budget": self.budget_name(cell.budget) if cell.budget else "dense",
            "allocation": budget.allocation.kind if budget else "none",
            "recovery": cell.recovery or "none",
            "evaluation": cell.evaluation,
            "targets": "+".join(budget.targets) if budget else "none",
            "keep_requested": budget.keep_bytes if budget else 1.0,
            "result": self.paths.result(cell),
        }
