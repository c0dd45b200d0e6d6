"""From the configuration to stages: labels of presets, cells of experiments, and what every stage depends on.

A label is `name-hash6`, the hash over the preset's own resolved content without values equal to their default. Paths
nest labels, so a path's beginning names exactly what is upstream of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from winnow.clusters import Clustering
from winnow.config import Calibration, Config, Method, Strict, random_control
from winnow.errors import InputError
from winnow.io import file_digest
from winnow.metrics import GRADIENTS, METRICS
from winnow.models import model_files
from winnow.provenance import CodeTracker, versions
from winnow.structures import STRUCTURES, structure_of
from winnow.structures.base import Structure
from winnow.tokens import PROTOCOLS

TORCH = ("torch", "numpy", "safetensors")
HUGGING_FACE = (*TORCH, "transformers", "tokenizers")
TABLES = ("numpy", "pandas", "pyarrow")
# Stage (rule, script, log folder): libraries whose version can change what it writes.
STAGES: dict[str, tuple[str, ...]] = {
    "retrieve_model": HUGGING_FACE,
    "retrieve_text": ("pyarrow",),
    "check_overlap": ("numpy",),
    "tokenize": HUGGING_FACE,
    "collect_statistics": HUGGING_FACE,
    "collect_gradients": HUGGING_FACE,
    "assign_clusters": (*TORCH, *TABLES, "scikit-learn"),
    "factorize": TORCH,
    "measure_spectra": (*TORCH, *TABLES),
    "allocate": TABLES,
    "compress": TORCH,
    "export_dense": HUGGING_FACE,
    "evaluate_perplexity": HUGGING_FACE,
    "cards": (),
    "tables": TABLES,
    "figures": ("matplotlib", *TABLES),
    "report": ("jinja2", *TABLES),
    "demo_texts": (),
    "demo_model": HUGGING_FACE,
}
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
DEMO_MODEL = {  # the recipe of resources/models/demo
    "vocab_size": 1024,
    "shape": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "training": {"steps": 800, "batch": 16, "length": 256, "rate": 0.003, "decay": 0.5, "seed": 0},
}
EXECUTION = {"shards"}  # options that say how a job runs; they are in no label
OF_STATISTICS = {"precision", "first_token", "gradient_labels"}  # options of a calibration that do not change its tokens
UNNAMED = EXECUTION | {"paper"}  # what else changes no number


def _with_controls(config: Config) -> tuple[dict[str, Method], dict[str, str]]:
    """All methods with their random controls, and {method: its control} by name. A preset of the same content serves.

    Raises InputError if another preset has the name of a control.
    """
    methods, controls = dict(config.methods), {}
    for name, method in config.methods.items():
        control = random_control(method)
        if control:
            content = (control.structure, control.metric)
            same = sorted(other for other, m in config.methods.items() if (m.structure, m.metric) == content)
            controls[name] = same[0] if same else f"{name}.random"
            if not same and controls[name] in config.methods:
                where = f"methods.{controls[name]}"
                raise InputError(f"{where}: the name is taken by the random control of {name!r}; rename the preset")
            methods.setdefault(controls[name], control)
    return methods, controls


def _by_seed(config: Config) -> tuple[dict[str, Calibration], dict[str, str]]:
    """All calibrations, one seed each, and {name: the preset that it is a seed of, or is}.

    Raises InputError if a preset has the name of another one's seed."""
    found: dict[str, Calibration] = {}
    presets: dict[str, str] = {}
    for name, preset in config.calibrations.items():
        for of_seed, calibration in preset.by_seed(name).items():
            if of_seed != name and of_seed in config.calibrations:
                raise InputError(f"calibrations.{of_seed}: the name is taken by a seed of {name!r}; rename the preset")
            found[of_seed], presets[of_seed] = calibration, name
    return found, presets


def _kinds(content: dict[str, Any]) -> list[str]:
    """All kinds in a resolved preset, nested ones too, each once."""
    inner = [kind for value in content.values() if isinstance(value, dict) for kind in _kinds(value)]
    return list(dict.fromkeys([*([content["kind"]] if "kind" in content else []), *inner]))


@dataclass(frozen=True)
class Cell:
    """One evaluated point, as preset names. `method` is None for the dense model, and so are its upstream choices."""

    model: str
    evaluation: str
    calibration: str | None = None
    method: str | None = None
    budget: str | None = None
    recovery: str | None = None


class Plan:
    """Labels and specifications of a validated configuration; knows nothing of Snakemake and starts no job."""

    def __init__(self, config: Config, root: Path):
        self.methods, self.controls = _with_controls(config)
        calibrations, self.preset_of_seed = _by_seed(config)
        self.config = config.model_copy(update={"methods": self.methods, "calibrations": calibrations})
        self.code = CodeTracker(root)
        self.labels: dict[str, dict[str, str]] = {}
        self.names: dict[str, dict[str, str]] = {}
        for section in ("models", "texts", "calibrations", "methods", "budgets", "recoveries", "evaluations"):
            presets: dict[str, Strict] = getattr(self.config, section)
            self.labels[section] = {name: self._label(section, name, preset) for name, preset in presets.items()}
            self.names[section] = {label: name for name, label in self.labels[section].items()}
        self.cells = self._cells()

    def _label(self, section: str, name: str, preset: Strict) -> str:
        content = preset.model_dump(exclude_defaults=True, exclude=UNNAMED, mode="json")
        if "text" in content:  # the text itself, not what it is called
            content["text"] = self.config.texts[content["text"]].model_dump(exclude_defaults=True, mode="json")
        digest = hashlib.sha256(json.dumps([section, content], sort_keys=True).encode()).hexdigest()
        if section == "calibrations":  # a seed has one label, whether it stands in a list or by itself
            name = self.preset_of_seed[name]
        return f"{name}-{digest[:6]}"

    def _seeds(self, calibrations: list[str]) -> list[str]:
        """The names of all seeds of the presets."""
        return [name for preset in calibrations for name, of in self.preset_of_seed.items() if of == preset]

    def _cells(self) -> list[Cell]:
        """Cells of all experiments, each once: the dense ones first."""
        dense: dict[Cell, None] = {}
        compressed: dict[Cell, None] = {}
        for e in self.config.experiments.values():
            for model, evaluation in product(e.models, e.evaluations):
                dense[Cell(model, evaluation)] = None
            methods = [name for m in e.methods for name in (m, self.controls.get(m) if e.controls else None) if name]
            for row in product(e.models, e.evaluations, self._seeds(e.calibrations), methods, e.budgets, e.recoveries):
                compressed[Cell(*row)] = None
        return [*dense, *compressed]

    def check_sources(self) -> None:
        """Raise InputError for a local model or text that an experiment uses and that is not there."""
        for name in dict.fromkeys(cell.model for cell in self.cells):
            self.local_model_files(self.labels["models"][name])
        for name in dict.fromkeys(text for cell in self.cells for text in self.texts_of(cell)):
            for file in self.config.texts[name].files:
                if not Path(file).is_file():
                    raise InputError(f"texts.{name}.files: {file}: there is no such file")

    def texts_of(self, cell: Cell) -> list[str]:
        texts = [self.config.evaluations[cell.evaluation].text]
        return texts + ([self.config.calibrations[cell.calibration].text] if cell.calibration else [])

    def local_model_files(self, label: str) -> list[str]:
        """Files of a local model; none for one on the hub, which `retrieve_model` downloads."""
        model = self.preset("models", label)
        return [str(p) for p in model_files(model.source)] if model.local() else []

    def preset(self, section: str, label: str) -> Any:
        return getattr(self.config, section)[self.names[section][label]]

    def all_labels(self) -> list[str]:
        """Every label that a path of a result can hold."""
        return sorted({label for section in self.names.values() for label in section} | set(self.clusterings()))

    def knows(self, wildcard: str, label: str) -> bool:
        """Whether a rule's wildcard can have this value."""
        if wildcard == "shard":
            return True
        if wildcard == "clustering":
            return label in self.clusterings()
        sections = {"other": ["texts"], "windows": ["calibrations", "evaluations"], "recovery": ["recoveries"]}
        return any(label in self.names[section] for section in sections.get(wildcard, [f"{wildcard}s"]))

    def pattern(self, *sections: str) -> str:
        """A regular expression of all labels of the sections."""
        return "|".join(label.replace(".", r"\.") for s in sections for label in self.names[s])

    def text_label(self, section: str, label: str) -> str:
        """The label of the text that a calibration or an evaluation reads."""
        return self.labels["texts"][self.preset(section, label).text]

    # Paths of artefacts, from labels.

    def folder(self, cell: Cell, *sections: str) -> str:
        one = {"models": cell.model, "calibrations": cell.calibration, "methods": cell.method}
        one |= {"budgets": cell.budget, "recoveries": cell.recovery}
        return "/".join(["results", *(self.labels[s][one[s]] for s in sections)])  # type: ignore[index]

    def result(self, cell: Cell) -> str:
        """The path of a cell's perplexity."""
        evaluation = self.labels["evaluations"][cell.evaluation]
        if cell.method is None:
            return f"{self.folder(cell, 'models')}/dense/{evaluation}.json"
        return f"{self.folder(cell, 'models', 'calibrations', 'methods', 'budgets', 'recoveries')}/{evaluation}.json"

    def shards(self, model_label: str) -> list[str]:
        total = self.preset("models", model_label).shards
        return [f"{i + 1}-of-{total}" for i in range(total)]

    def needs(self, method_label: str) -> set[str]:
        """Which of `moments`, `gradients` and `clusters` the factors of a method are fitted with."""
        method = self.preset("methods", method_label)
        metric = METRICS[method.metric.kind].needs if method.metric else ()
        structure = self.structure(method_label)
        needs = {*metric, *structure.needs()}
        found = {"gradients" if need in GRADIENTS else "moments" for need in needs}
        return found | ({"clusters"} if structure.clustering() else set())

    def structure(self, method_label: str) -> Structure:
        return structure_of(self.preset("methods", method_label).structure.model_dump())

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

    # What each stage's result depends on, besides its input files.

    def spec(self, stage: str, wildcards: dict[str, str]) -> dict[str, Any]:
        """The parameters of a stage: builtin types only, keys sorted."""
        of_stage = getattr(self, f"_spec_{stage}", None)
        return json.loads(json.dumps(of_stage(wildcards) if of_stage else {}, sort_keys=True))

    def fingerprint(self, stage: str, wildcards: dict[str, str]) -> list[str]:
        """Digests of the stage's script and of every project module that it reaches."""
        entries = [f"{stage}.py"]
        if "method" in wildcards:
            method = self.preset("methods", wildcards["method"])
            kinds = _kinds(method.model_dump())
            entries += [f"winnow.structures.{kind}" for kind in kinds if kind in STRUCTURES]
            metrics = [METRICS[kind].__name__ for kind in kinds if kind in METRICS]
            if stage == "factorize" and metrics:
                entries.append(f"winnow.metrics:{metrics[0]}" if len(metrics) == 1 else "winnow.metrics")
        return list(self.code.fingerprint(*entries))

    def versions(self, stage: str) -> dict[str, str]:
        return versions(*STAGES[stage])

    def _spec_retrieve_model(self, w: dict[str, str]) -> dict[str, Any]:
        model = self.preset("models", w["model"])
        return {"source": model.source, "revision": model.revision}

    def _spec_retrieve_text(self, w: dict[str, str]) -> dict[str, Any]:
        return self.preset("texts", w["text"]).model_dump()

    def _spec_tokenize(self, w: dict[str, str]) -> dict[str, Any]:
        section = "calibrations" if w["windows"] in self.names["calibrations"] else "evaluations"
        preset = self.preset(section, w["windows"])
        windows = preset.model_dump(exclude={"text", "compare", *OF_STATISTICS})
        if section == "evaluations":
            windows["version"] = PROTOCOLS[preset.protocol].version
        return {"kind": section, "join": self.config.texts[preset.text].join, **windows}

    def _spec_collect_statistics(self, w: dict[str, str]) -> dict[str, Any]:
        spec = self.preset("calibrations", w["calibration"]).model_dump(include={"precision", "first_token"})
        return {"dtype": self.preset("models", w["model"]).dtype, **spec}

    def _spec_collect_gradients(self, w: dict[str, str]) -> dict[str, Any]:
        spec = self.preset("calibrations", w["calibration"]).model_dump(include={*OF_STATISTICS, "seed"})
        return {"dtype": self.preset("models", w["model"]).dtype, **spec}

    def _spec_assign_clusters(self, w: dict[str, str]) -> dict[str, Any]:
        return {"clustering": self.clusterings()[w["clustering"]].model_dump()}

    def _method(self, w: dict[str, str]) -> dict[str, Any]:
        method = self.preset("methods", w["method"])
        metric = method.metric
        return method.model_dump(exclude=UNNAMED) | {
            "structure_version": STRUCTURES[method.structure.kind].version,
            "metric_version": METRICS[metric.kind].version if metric else None,
        }

    def _spec_factorize(self, w: dict[str, str]) -> dict[str, Any]:
        return {"method": self._method(w), "shard": w["shard"]}

    def _spec_measure_spectra(self, w: dict[str, str]) -> dict[str, Any]:
        return {"metric": self.preset("methods", w["method"]).objective}

    def _spec_allocate(self, w: dict[str, str]) -> dict[str, Any]:
        return {"structure": self._method(w)["structure"], "budget": self.preset("budgets", w["budget"]).model_dump()}

    def _spec_compress(self, w: dict[str, str]) -> dict[str, Any]:
        sections = ("models", "calibrations", "methods", "budgets")
        names = {s.removesuffix("s"): self.names[s][w[s.removesuffix("s")]] for s in sections}
        names["calibration"] = self.preset_of_seed[names["calibration"]]
        model, calibration = self.preset("models", w["model"]), self.preset("calibrations", w["calibration"])
        return {
            "names": names,
            "dtype": model.dtype,
            "presets": {
                "model": model.model_dump(exclude=EXECUTION),
                "calibration": calibration.model_dump(),
                "calibration_text": self.config.texts[calibration.text].model_dump(exclude_defaults=True, mode="json"),
                "method": self._method(w),
                "budget": self.preset("budgets", w["budget"]).model_dump(),
            },
        }

    def _spec_evaluate_perplexity(self, w: dict[str, str]) -> dict[str, Any]:
        evaluation = self.preset("evaluations", w["evaluation"])
        spec = evaluation.model_dump(include={"protocol", "length", "stride", "compare"})
        rule = PROTOCOLS[evaluation.protocol]
        recovery = {"recovery": self.preset("recoveries", w["recovery"]).model_dump()} if "recovery" in w else {}
        dtype = self.preset("models", w["model"]).dtype
        return {**spec, **recovery, "dtype": dtype, "protocol_version": rule.version, "rule": rule.rule}

    def _spec_demo_model(self, w: dict[str, str]) -> dict[str, Any]:
        return DEMO_MODEL

    def _spec_report(self, w: dict[str, str]) -> dict[str, Any]:
        return {"template": file_digest(TEMPLATE), "cells": len(self.cells)}

    def exported(self) -> list[Cell]:
        """Cells whose checkpoints are asked for as dense models: the methods that are named, not their controls."""
        asked = [e for e in self.config.experiments.values() if e.export == "dense"]
        rows = [
            row
            for e in asked
            for row in product(e.models, e.evaluations, self._seeds(e.calibrations), e.methods, e.budgets, e.recoveries)
        ]
        return [Cell(*row) for row in rows]

    def _spec_cards(self, w: dict[str, str]) -> dict[str, Any]:
        """{card: the checkpoint that it describes, and {evaluation: the artefacts for it and for the dense model}}."""
        cards: dict[str, Any] = {}
        for cell in self.cells:
            if cell.method is None:
                continue
            folder = self.folder(cell, "models", "calibrations", "methods", "budgets")
            path = f"{self.folder(cell, 'models', 'calibrations', 'methods', 'budgets', 'recoveries')}/README.md"
            found = cards.setdefault(path, {"checkpoint": f"{folder}/checkpoint/manifest.json", "evaluations": {}})
            dense = self.result(Cell(cell.model, cell.evaluation))
            found["evaluations"][cell.evaluation] = {"compressed": self.result(cell), "dense": dense}
        return {"cards": cards}

    def _spec_tables(self, w: dict[str, str]) -> dict[str, Any]:
        rows = []
        for cell in self.cells:
            method = self.config.methods[cell.method] if cell.method else None
            budget = self.config.budgets[cell.budget] if cell.budget else None
            rows.append(
                {
                    "model": cell.model,
                    "calibration": cell.calibration or "none",
                    "seeds_of": self.preset_of_seed[cell.calibration] if cell.calibration else "none",
                    "seed": self.config.calibrations[cell.calibration].seed if cell.calibration else None,
                    "method": cell.method or "dense",
                    "structure": method.structure.kind if method else "dense",
                    "metric": method.objective if method else "none",
                    "budget": cell.budget or "dense",
                    "allocation": budget.allocation.kind if budget else "none",
                    "recovery": cell.recovery or "none",
                    "evaluation": cell.evaluation,
                    "targets": "+".join(budget.targets) if budget else "none",
                    "keep_requested": budget.keep_bytes if budget else 1.0,
                    "result": self.result(cell),
                }
            )
        return {"rows": rows}
