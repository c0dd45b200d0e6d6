"""Labels of presets, and what presets say of each other.

A label is `name-hash6`, the hash over the preset's own resolved content without values equal to their default. Paths
nest labels, so a path's beginning names exactly what is upstream of it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

from winnow.allocation.base import ALLOCATIONS, Allocation
from winnow.allocation.times import Timing
from winnow.calibration.clusters import Clustering
from winnow.data.task_files import files_of
from winnow.evaluation.kinds.classification import Classification
from winnow.metrics.base import METRICS
from winnow.models.architectures import GRADIENTS
from winnow.models.files import model_files
from winnow.models.gguf import gguf_file
from winnow.planning.config import Config, Strict
from winnow.planning.derived import add_budgets, add_members, add_studies, calibrations_by_seed, with_controls
from winnow.recovery.base import RecoveryOptions
from winnow.structures.base import STRUCTURES, Structure

EXECUTION = {"shards", "window_shards", "load", "factors"}  # options that say how a job runs; they are in no label
UNNAMED = EXECUTION | {"paper"}  # what else changes no number


class Labels:
    """The presets of a validated configuration and those that follow from them, by name and by label."""

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
        if section == "calibrations":  # a seed has one label, whether it is given in a list or by itself
            name = self.preset_of_seed[name]
        if section == "budgets":
            name = self.budget_name(name)
        return f"{name}-{digest[:6]}"

    def seeds(self, calibrations: list[str]) -> list[str]:
        """The names of all seeds of the presets."""
        return [name for preset in calibrations for name, of in self.preset_of_seed.items() if of == preset]

    def spread_by(self, method: str | None, name: str) -> str:
        """The budget of this name as the method spreads it, by name."""
        return self.spread.get((method or "", name), name)

    def budget_name(self, name: str) -> str:
        """What a budget is called in the configuration, of one that a method spreads likewise."""
        return next((asked for (_, asked), added in self.spread.items() if added == name), name)

    def recovers(self, name: str) -> bool:
        """Whether the recovery of this name does anything."""
        return self.config.recoveries[name].kind != "none"

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

    def tuned(self, label: str) -> bool:
        """Whether a model is trained on a task before anything else."""
        return self.preset("models", label).finetune is not None

    def local_model_files(self, label: str) -> list[str]:
        """Files of a local model; none for one on the hub, which `retrieve_model` downloads."""
        model = self.preset("models", label)
        if not model.local():
            return []
        file = gguf_file(model.source)
        return [str(file)] if file else [str(p) for p in model_files(model.source)]

    def dequantized(self, label: str) -> bool:
        """Whether a model is in a GGUF file, which is written as safetensors before anything else."""
        model = self.preset("models", label)
        return model.local() and gguf_file(model.source) is not None

    def task_files(self, label: str) -> list[str]:
        """Local files that the tasks of an accuracy preset read."""
        return files_of(self.names["evaluations"][label], self.preset("evaluations", label))

    def preset(self, section: str, label: str) -> Any:
        return getattr(self.config, section)[self.names[section][label]]

    def all_labels(self) -> list[str]:
        """Every label that a path of a result can hold."""
        own = {label for section in self.names.values() for label in section}
        return sorted(own | set(self.clusterings()) | set(self.timings()) | set(self.tasks()))

    def knows(self, wildcard: str, label: str) -> bool:
        """Whether a rule's wildcard can have this value."""
        if wildcard in ("shard", "part"):
            return True
        if wildcard == "study":
            return label in self.of_studies
        own: dict[str, Any] = {"clustering": self.clusterings, "timing": self.timings, "task": self.tasks}
        if wildcard in own:
            return label in own[wildcard]()
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

    def shards(self, model_label: str) -> list[str]:
        total = self.preset("models", model_label).shards
        return [f"{i + 1}-of-{total}" for i in range(total)]

    def parts(self, model_label: str, calibration_label: str) -> list[str]:
        """The parts into which jobs divide the windows of a calibration; none if one job runs them all."""
        windows = self.preset("calibrations", calibration_label).windows
        total = min(self.preset("models", model_label).window_shards, windows)
        return [f"{i + 1}-of-{total}" for i in range(total)] if total > 1 else []

    def models_of(self, parted: bool) -> str:
        """A regular expression of the labels of models whose windows are divided over jobs, or of all others."""
        found = [label for label in self.names["models"] if (self.preset("models", label).window_shards > 1) == parted]
        return "|".join(label.replace(".", r"\.") for label in found) or "none"

    def models_of_factors(self, factors: str) -> str:
        """A regular expression of the labels of models whose factors are `stored` or `refitted`."""
        found = [label for label in self.names["models"] if self.preset("models", label).factors == factors]
        return "|".join(label.replace(".", r"\.") for label in found) or "none"

    def refits(self, model_label: str, method_label: str) -> bool:
        """Whether factors of a model by a method, or by any that it chooses between, are fitted again where they are read."""
        return self.preset("models", model_label).factors == "refitted" and self._leaves_out(method_label)

    @cache  # noqa: B019
    def _leaves_out(self, method_label: str) -> bool:
        return any(structure.leaves_out(needs) for structure, needs in self._members(method_label))

    def _members(self, method_label: str) -> list[tuple[Structure, tuple[str, ...]]]:
        """The structures that a method chooses between, and what the metric of each needs."""
        return [
            (STRUCTURES.build(method.structure.model_dump()), METRICS[method.metric.kind].needs if method.metric else ())
            for method in self.preset("methods", method_label).members()
        ]

    @cache  # noqa: B019
    def refits_with(self, method_label: str) -> set[str]:
        """Which of `moments` and `gradients` factors that are fitted again are fitted with."""
        found = [{*needs, *own.needs()} for own, needs in self._members(method_label) if own.leaves_out(needs)]
        return {"gradients" if need in GRADIENTS else "moments" for needs in found for need in needs}

    @cache  # noqa: B019
    def predicts_at_once(self, method_label: str) -> bool:
        """Whether the losses of a method without alternatives are predicted where its factors are fitted without tensors."""
        return all(structure.predicts_at_once(needs) for structure, needs in self._members(method_label))

    @cache  # noqa: B019 - one plan lives as long as the process, and thousands of cells share a preset
    def needs(self, method_label: str) -> set[str]:
        """Which of `moments`, `gradients` and `clusters` the factors of a method are fitted with."""
        method = self.preset("methods", method_label)
        metric = METRICS[method.metric.kind].needs if method.metric else ()
        structure = self.structure(method_label)
        needs = {*metric, *structure.needs()}
        found = {"gradients" if need in GRADIENTS else "moments" for need in needs}
        return found | ({"clusters"} if structure.clustering() else set())

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

    def timing_label(self, method_label: str, budget_label: str) -> str | None:
        """The label of the times that a budget's allocation reads, which methods of the same structure and all bounds share."""
        timing = self.allocation(budget_label).timing()
        if timing is None:
            return None
        structure = self.preset("methods", method_label).structure
        content = [structure.model_dump(mode="json"), timing.model_dump(exclude={"keep"}, mode="json")]
        return f"times-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]}"

    @cache  # noqa: B019
    def timings(self) -> dict[str, tuple[str, Timing]]:
        """Every label of times: a method of its structure, and the timing."""
        timed = {budget: timing for budget in self.names["budgets"] if (timing := self.allocation(budget).timing())}
        pairs = [(method, budget) for budget in timed for method in self.names["methods"]]
        return {str(self.timing_label(method, budget)): (method, timed[budget]) for method, budget in reversed(pairs)}

    def clusterings(self) -> dict[str, Clustering]:
        """Every assignment of clusters by its label."""
        found = {self.clustering_label(label): self.structure(label).clustering() for label in self.names["methods"]}
        return {label: clustering for label, clustering in found.items() if label and clustering}
