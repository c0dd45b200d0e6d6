"""From the configuration to what is measured: labels of presets, cells of experiments, paths of artefacts.

A label is `name-hash6`, the hash over the preset's own resolved content without values equal to their default. Paths
nest labels, so a path's beginning names exactly what is upstream of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from os.path import isfile  # unlike Path's, it takes names that no file can have
from typing import Any

from winnow.allocation.base import ALLOCATIONS, Allocation
from winnow.calibration.clusters import Clustering
from winnow.data.task_files import files_of
from winnow.data.text_formats import has_objects
from winnow.errors import InputError
from winnow.evaluation.base import EVALUATIONS, PLAIN
from winnow.evaluation.kinds.classification import Classification
from winnow.evaluation.kinds.perplexity import Perplexity
from winnow.metrics.base import METRICS
from winnow.models.architectures import GRADIENTS
from winnow.models.files import model_files
from winnow.planning.config import Config, Experiment, Strict
from winnow.planning.derived import add_budgets, add_members, add_studies, calibrations_by_seed, with_controls
from winnow.recovery.base import RecoveryOptions
from winnow.structures.base import STRUCTURES, Structure

EXECUTION = {"shards", "load"}  # options that say how a job runs; they are in no label
UNNAMED = EXECUTION | {"paper"}  # what else changes no number


@dataclass(frozen=True)
class Cell:
    """One evaluated point, as preset names. `method` is None for the dense model, and so are its upstream choices; with a
    recovery, which needs a calibration, it is the dense model after the same recovery: the control of recovered cells."""

    model: str
    evaluation: str
    calibration: str | None = None
    method: str | None = None
    budget: str | None = None
    recovery: str | None = None
    kind: str = PLAIN  # of the evaluation


class Grid:
    """Labels, cells and paths of a validated configuration."""

    def __init__(self, config: Config):
        self.methods, self.controls = with_controls(config)
        calibrations, self.preset_of_seed = calibrations_by_seed(config)
        self.budgets = dict(config.budgets)
        recoveries: dict[str, RecoveryOptions] = dict(config.recoveries)
        self.of_studies = add_studies(self.methods, self.budgets, recoveries)
        self.members = add_members(self.methods)
        self.spread = add_budgets(config, self.methods, self.budgets)
        updated = {"methods": self.methods, "budgets": self.budgets, "calibrations": calibrations, "recoveries": recoveries}
        self.config = config.model_copy(update=updated)
        self.labels: dict[str, dict[str, str]] = {}
        self.names: dict[str, dict[str, str]] = {}
        for section in ("models", "texts", "calibrations", "methods", "budgets", "recoveries", "evaluations"):
            presets: dict[str, Strict] = getattr(self.config, section)
            self.labels[section] = {name: self._label(section, name, preset) for name, preset in presets.items()}
            self.names[section] = {label: name for name, label in self.labels[section].items()}
        self.cells = self._cells()

    def _content(self, section: str, preset: Strict) -> dict[str, Any]:
        """What a preset says, with what it names put in the place of names."""
        content = preset.model_dump(exclude_defaults=True, exclude=UNNAMED, mode="json")
        if "text" in content:  # the text itself, not what it is called
            content["text"] = self.config.texts[content["text"]].model_dump(exclude_defaults=True, mode="json")
        if "after" in content:  # likewise
            content["after"] = self._content("recoveries", self.config.recoveries[content["after"]])
        for part in (content, content.get("finetune", {})):  # the rows that are learned, and how long they are
            if "task" in part:
                task = self.task(part["task"])
                part["task"] = {"rows": task.rows(), "length": task.length}
        return content

    def _label(self, section: str, name: str, preset: Strict) -> str:
        content = self._content(section, preset)
        digest = hashlib.sha256(json.dumps([section, content], sort_keys=True).encode()).hexdigest()
        if section == "calibrations":  # a seed has one label, whether it stands in a list or by itself
            name = self.preset_of_seed[name]
        if section == "budgets":
            name = self.budget_name(name)
        return f"{name}-{digest[:6]}"

    def _seeds(self, calibrations: list[str]) -> list[str]:
        """The names of all seeds of the presets."""
        return [name for preset in calibrations for name, of in self.preset_of_seed.items() if of == preset]

    def _budget(self, method: str | None, name: str) -> str:
        """The budget of this name as the method spreads it, by name."""
        return self.spread.get((method or "", name), name)

    def budget_name(self, name: str) -> str:
        """What a budget is called in the configuration, of one that a method spreads likewise."""
        return next((asked for (_, asked), added in self.spread.items() if added == name), name)

    def _cells(self) -> list[Cell]:
        """Cells of all experiments, each once: the dense ones first, then those after the same recovery."""
        dense: dict[Cell, None] = {}
        healed: dict[Cell, None] = {}
        compressed: dict[Cell, None] = {}
        for e in self.config.experiments.values():
            for model, evaluation in product(e.models, e.evaluations):
                dense[Cell(model, evaluation, kind=self.config.evaluations[evaluation].kind)] = None
            recoveries = [name for name in e.recoveries if self.recovers(name)]
            for model, evaluation, calibration, recovery in product(
                e.models, e.evaluations, self._seeds(e.calibrations), recoveries
            ):
                kind = self.config.evaluations[evaluation].kind
                if EVALUATIONS[kind].recovered:
                    healed[Cell(model, evaluation, calibration, recovery=recovery, kind=kind)] = None
            methods = [name for m in e.methods for name in (m, self.controls.get(m) if e.controls else None) if name]
            seeds = self._seeds(e.calibrations)
            for m, ev, c, method, b, r in product(e.models, e.evaluations, seeds, methods, e.budgets, e.recoveries):
                kind = self.config.evaluations[ev].kind
                compressed[Cell(m, ev, c, method, self._budget(method, b), r, kind)] = None
        return [*dense, *healed, *compressed]

    def recovers(self, name: str) -> bool:
        """Whether the recovery of this name does anything."""
        return self.config.recoveries[name].kind != "none"

    def exported(self) -> list[Cell]:
        """Cells whose checkpoints are asked for as dense models: the methods that are named, not their controls."""
        return [cell for e in self.config.experiments.values() if e.export == "dense" for cell in self._exports(e)]

    def _exports(self, e: Experiment) -> list[Cell]:
        rows = product(e.models, e.evaluations, self._seeds(e.calibrations), e.methods, e.budgets, e.recoveries)
        return [Cell(*row[:4], self._budget(row[3], row[4]), *row[5:]) for row in rows]

    @cached_property
    def export_dtypes(self) -> dict[str, str]:
        """{manifest of a dense export: the dtype that it is asked for in}"""
        asked = [e for e in self.config.experiments.values() if e.export == "dense"]
        return {self.made(cell, "dense_export"): e.export_dtype for e in asked for cell in self._exports(e)}

    def cells_of(self, kind: str) -> list[Cell]:
        """The cells whose evaluation is of this kind, dense ones first."""
        return [cell for cell in self.cells if cell.kind == kind]

    def check_sources(self) -> None:
        """Raise InputError for a local model, text or file of a task that an experiment uses and that is not there, and for rows
        of JSON that would be read as plain text."""
        for name in dict.fromkeys(cell.model for cell in self.cells):
            self.local_model_files(self.labels["models"][name])
        for name in dict.fromkeys(text for cell in self.cells for text in self.texts_of(cell)):
            text = self.config.texts[name]
            for file in text.files:
                if not isfile(file):
                    raise InputError(f"texts.{name}.files: {file}: there is no such file")
                if (text.format == "lines" or "format" not in text.model_fields_set) and has_objects(file):
                    raise InputError(
                        f"texts.{name}: {file}: its lines are JSON objects; say `format: jsonl` to read a column of them, or "
                        "`format: raw` if braces and keys are part of the text"
                    )
        for name in dict.fromkeys(cell.evaluation for cell in self.cells_of("accuracy")):
            self.task_files(self.labels["evaluations"][name])
        for name in dict.fromkeys(name for cell in self.cells for name in self.tasks_of(cell)):
            for file in [*self.task(name).train, *self.task(name).test]:
                if not isfile(file):
                    raise InputError(f"evaluations.{name}: {file}: there is no such file")

    def texts_of(self, cell: Cell) -> list[str]:
        """Names of the texts that a cell reads: of its evaluation, if it has one, and of its calibration."""
        evaluation = self.config.evaluations[cell.evaluation]
        texts = [evaluation.text] if isinstance(evaluation, Perplexity.Options) else []
        calibration = self.config.calibrations[cell.calibration].text if cell.calibration else None
        return [*texts, *([calibration] if calibration else [])]

    def task(self, name: str) -> Classification.Options:
        """The classification task of this name."""
        found = self.config.evaluations[name]
        assert isinstance(found, Classification.Options)
        return found

    def task_label(self, name: str) -> str:
        """The label of a task's rows, which evaluations that score them in other ways share."""
        rows = json.dumps(self.task(name).rows(), sort_keys=True)
        return f"task-{hashlib.sha256(rows.encode()).hexdigest()[:6]}"

    def tasks(self) -> dict[str, Classification.Options]:
        """Every classification task by the label of its rows."""
        names = [name for name, e in self.config.evaluations.items() if isinstance(e, Classification.Options)]
        return {self.task_label(name): self.task(name) for name in names}

    def tasks_of(self, cell: Cell) -> list[str]:
        """Names of the classification tasks whose rows a cell reads: to score, to tune, or to calibrate on."""
        parts: list[Any] = [self.config.models[cell.model].finetune]
        parts += [self.config.calibrations[cell.calibration]] if cell.calibration else []
        parts += [self.config.recoveries[step] for step in self.config.steps(cell.recovery)] if cell.recovery else []
        named = [getattr(part, "task", None) for part in parts]
        return [name for name in [cell.evaluation if cell.kind == "classification" else None, *named] if name]

    def tuned(self, label: str) -> bool:
        """Whether a model is trained on a task before anything else."""
        return self.preset("models", label).finetune is not None

    def local_model_files(self, label: str) -> list[str]:
        """Files of a local model; none for one on the hub, which `retrieve_model` downloads."""
        model = self.preset("models", label)
        return [str(p) for p in model_files(model.source)] if model.local() else []

    def task_files(self, label: str) -> list[str]:
        """Local files that the tasks of an accuracy preset read."""
        return files_of(self.names["evaluations"][label], self.preset("evaluations", label))

    def preset(self, section: str, label: str) -> Any:
        return getattr(self.config, section)[self.names[section][label]]

    def all_labels(self) -> list[str]:
        """Every label that a path of a result can hold."""
        own = {label for section in self.names.values() for label in section}
        return sorted(own | set(self.clusterings()) | set(self.tasks()))

    def knows(self, wildcard: str, label: str) -> bool:
        """Whether a rule's wildcard can have this value."""
        if wildcard == "shard":
            return True
        if wildcard == "study":
            return label in self.of_studies
        if wildcard in ("clustering", "task"):
            return label in (self.clusterings() if wildcard == "clustering" else self.tasks())
        sections = {"other": ["texts"], "windows": ["calibrations", "evaluations"], "recovery": ["recoveries"]}
        return any(label in self.names[section] for section in sections.get(wildcard, [f"{wildcard}s"]))

    def pattern(self, *sections: str, kind: str | None = None) -> str:
        """A regular expression of all labels of the sections; with `kind` only those evaluations of it, and with `kind: recovers`
        only recoveries that do anything. `none` is no label."""
        labels = [
            label
            for section in sections
            for label in self.names[section]
            if kind is None
            or section not in ("evaluations", "recoveries")
            or (self.recovers(self.names[section][label]) if kind == "recovers" else self.preset(section, label).kind == kind)
        ]
        return "|".join(label.replace(".", r"\.") for label in labels) or "none"

    def windows_of(self, what: str) -> str:
        """A regular expression of all labels of windows that are cut from a text, or are the rows of a task (`what`)."""
        calibrations = [n for n, c in self.config.calibrations.items() if (c.task is None) == (what == "text")]
        labels = [self.labels["calibrations"][name].replace(".", r"\.") for name in calibrations]
        others = [self.pattern("evaluations", kind="perplexity")] if what == "text" else []
        return "|".join([*labels, *others]) or "none"

    def text_label(self, section: str, label: str) -> str:
        """The label of the text that a calibration or an evaluation reads."""
        return self.labels["texts"][self.preset(section, label).text]

    # Paths of artefacts, from labels.

    def folder(self, cell: Cell, *sections: str) -> str:
        one = {"models": cell.model, "calibrations": cell.calibration, "methods": cell.method}
        one |= {"budgets": cell.budget, "recoveries": cell.recovery}
        return "/".join(["results", *(self.labels[s][one[s]] for s in sections)])  # type: ignore[index]

    def result(self, cell: Cell) -> str:
        """The path of what was measured at a cell."""
        evaluation = self.labels["evaluations"][cell.evaluation]
        if cell.method is None and cell.recovery is None:
            return f"{self.folder(cell, 'models')}/dense/{evaluation}.json"
        return f"{self.recovered(cell)}/{evaluation}.json"

    def recovered(self, cell: Cell) -> str:
        """The folder of a cell that names a recovery."""
        if cell.method is None:
            return f"{self.folder(cell, 'models', 'calibrations')}/dense/{self.labels['recoveries'][str(cell.recovery)]}"
        return self.folder(cell, "models", "calibrations", "methods", "budgets", "recoveries")

    def made(self, cell: Cell, what: str = "checkpoint") -> str:
        """The manifest of the checkpoint (or of `dense_export`) of a compressed cell, after its recovery if it has one."""
        if self.recovers(str(cell.recovery)):
            return f"{self.recovered(cell)}/{what}/manifest.json"
        return f"{self.folder(cell, 'models', 'calibrations', 'methods', 'budgets')}/{what}/manifest.json"

    def shards(self, model_label: str) -> list[str]:
        total = self.preset("models", model_label).shards
        return [f"{i + 1}-of-{total}" for i in range(total)]

    def of_members(self, model: str, calibration: str, method: str, name: str) -> list[str]:
        """The files `name` of a method by labels, or of the methods that it chooses between, one after the other; with `{shard}`
        in the name, of all shards."""
        labels = [self.labels["methods"][member] for member in self.members[self.names["methods"][method]]]
        shards = self.shards(model) if "{shard}" in name else [""]
        return [f"results/{model}/{calibration}/{label}/{name.format(shard=shard)}" for label in labels for shard in shards]

    @cache  # noqa: B019 - one plan lives as long as the process, and thousands of cells share a preset
    def needs(self, method_label: str) -> set[str]:
        """Which of `moments`, `gradients` and `clusters` the factors of a method are fitted with."""
        method = self.preset("methods", method_label)
        metric = METRICS[method.metric.kind].needs if method.metric else ()
        structure = self.structure(method_label)
        needs = {*metric, *structure.needs()}
        found = {"gradients" if need in GRADIENTS else "moments" for need in needs}
        return found | ({"clusters"} if structure.clustering() else set())

    def reads_moments(self, cell: Cell) -> bool:
        """Whether second moments of inputs are in a cell: in its factors, or in the losses that its bytes are spread by."""
        if cell.method is None:
            return False
        members = (self.labels["methods"][member] for member in self.members[cell.method])
        predicts = self.allocation(self.labels["budgets"][str(cell.budget)]).predicts()
        return predicts or any("moments" in self.needs(member) for member in members)

    @cache  # noqa: B019
    def structure(self, method_label: str) -> Structure:
        return STRUCTURES.build(self.preset("methods", method_label).structure.model_dump())

    @cache  # noqa: B019
    def allocation(self, budget_label: str) -> Allocation:
        return ALLOCATIONS.build(self.preset("budgets", budget_label).allocation.model_dump())

    @cache  # noqa: B019
    def clustering_label(self, method_label: str) -> str | None:
        """The label of a method's assignment of clusters, which methods of other metrics can share."""
        clustering = self.structure(method_label).clustering()
        if clustering is None:
            return None
        content = clustering.model_dump(mode="json")
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{clustering.by}-{clustering.clusters}-{digest[:6]}"

    def clusterings(self) -> dict[str, Clustering]:
        """Every assignment of clusters by its label."""
        found = {self.clustering_label(label): self.structure(label).clustering() for label in self.names["methods"]}
        return {label: clustering for label, clustering in found.items() if label and clustering}
