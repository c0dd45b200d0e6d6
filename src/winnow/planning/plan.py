"""From the grid to stages: what the result of every stage depends on, besides its input files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from winnow.allocation.base import ALLOCATIONS
from winnow.data.tokens import PROTOCOLS
from winnow.evaluation.base import EVALUATIONS, PLAIN
from winnow.io.artifacts import file_digest
from winnow.metrics.base import METRICS
from winnow.planning.config import Calibration, Config
from winnow.planning.fingerprints import CodeTracker, versions
from winnow.planning.grid import EXECUTION, UNNAMED, Cell
from winnow.planning.outside import Outside
from winnow.planning.study_grid import StudyGrid
from winnow.recovery.base import RECOVERIES
from winnow.recovery.kinds.finetune import Finetune
from winnow.structures.base import STRUCTURES
from winnow.studies.base import STUDIES, study_of
from winnow.studies.claims import read_claims

TORCH = ("torch", "numpy", "safetensors")
HUGGING_FACE = (*TORCH, "transformers", "tokenizers")
TABLES = ("numpy", "pandas", "pyarrow")
TASKS = ("datasets", "lm-eval")
# Stage (rule, script, log folder): libraries whose version can change what it writes. `Plan.versions` adds those of presets.
STAGES: dict[str, tuple[str, ...]] = {
    "retrieve_model": HUGGING_FACE,
    "retrieve_base": (),
    "finetune": HUGGING_FACE,
    "retrieve_text": TABLES,
    "retrieve_examples": TABLES,
    "check_overlap": ("numpy",),
    "tokenize": HUGGING_FACE,
    "tokenize_rows": HUGGING_FACE,
    "collect_statistics": HUGGING_FACE,
    "collect_gradients": HUGGING_FACE,
    "assign_clusters": (*TORCH, *TABLES, "scikit-learn"),
    "factorize": TORCH,
    "measure_spectra": (*TORCH, *TABLES),
    "predict_losses": (*TORCH, *TABLES),
    "predict_in_rounds": (*HUGGING_FACE, *TABLES),
    "learn_sizes": (*HUGGING_FACE, *TABLES),
    "compress": (*TORCH, *TABLES),
    "recover": HUGGING_FACE,
    "export_dense": HUGGING_FACE,
    "retrieve_tasks": TASKS,
    "cards": (),
    "tables": TABLES,
    "figures": ("matplotlib", *TABLES),
    "report": ("jinja2", *TABLES),
    "measure_study": (*HUGGING_FACE, "scikit-learn"),
    "conclude_study": ("matplotlib", "jinja2", *TABLES),
    "studies": ("jinja2", *TABLES),
    "demo_texts": (),
    "demo_model": HUGGING_FACE,
}
# Stages of a kind of evaluation, which share a script.
OF_KINDS = [("evaluate", kind) for kind in EVALUATIONS]
OF_KINDS += [("tabulate", kind) for kind, cls in EVALUATIONS.items() if cls.tabulates()]
STAGES |= {f"evaluate_{kind}": (*HUGGING_FACE, *cls.libraries) for kind, cls in EVALUATIONS.items()}
STAGES |= {f"tabulate_{kind}": TABLES for script, kind in OF_KINDS if script == "tabulate"}
CLAIMS = Path("resources/claims.yaml")
ALLOCATING = ("predict_in_rounds", "learn_sizes", "compress")  # stages that reach the file of the budget's allocation
DENSE = {  # rules of the same stage
    "evaluate_dense": f"evaluate_{PLAIN}",
    **{f"evaluate_{kind}_dense": f"evaluate_{kind}" for kind in EVALUATIONS if kind != PLAIN},
    **{f"evaluate_{kind}_healed": f"evaluate_{kind}" for kind, cls in EVALUATIONS.items() if cls.recovered},
    "recover_dense": "recover",
    "export_dense_recovered": "export_dense",
    "check_rows": "check_overlap",
}
TEMPLATES = Path(__file__).parents[1] / "reporting/templates"
TEMPLATE, STUDY_TEMPLATE, PARTS = (TEMPLATES / f"{name}.html.j2" for name in ("report", "study", "parts"))
STUDIES_TEMPLATE = TEMPLATES / "studies.html.j2"
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
OF_STATISTICS = {"precision", "first_token", "gradient_labels"}  # options of a calibration that do not change its tokens


def _kinds(content: dict[str, Any]) -> list[str]:
    """All kinds in a resolved preset, nested ones too, each once."""
    parts = [part for value in content.values() for part in (value if isinstance(value, list) else [value])]
    inner = [kind for part in parts if isinstance(part, dict) for kind in _kinds(part)]
    return list(dict.fromkeys([*([content["kind"]] if "kind" in content else []), *inner]))


class Plan(StudyGrid):
    """Cells and stages of a validated configuration; knows nothing of Snakemake and starts no job."""

    def __init__(self, config: Config, root: Path, memory: Path | None = None):
        """`root`: the checkout, whose code is tracked; `memory`: a folder where digests of code are kept."""
        super().__init__(config)
        self.code = CodeTracker(root, memory)
        self.outside = Outside(self)

    def spec(self, stage: str, wildcards: dict[str, str]) -> dict[str, Any]:
        """The parameters of a stage: builtin types only, keys sorted."""
        script, _, kind = stage.partition("_")
        if (script, kind) in OF_KINDS:
            found = self._evaluate(kind, wildcards) if script == "evaluate" else self._tabulate(kind)
        else:
            found = getattr(self, f"_spec_{stage}", lambda _: {})(wildcards)
        return json.loads(json.dumps(found, sort_keys=True))

    def fingerprint(self, stage: str, wildcards: dict[str, str]) -> list[str]:
        """Digests of the stage's script and of every project module that it reaches."""
        recovery = wildcards.get("recovery") if stage == "recover" else None
        allocation = self.allocation(wildcards["budget"]).kind() if stage in ALLOCATING else None
        return list(self._fingerprint(stage, wildcards.get("method"), allocation, recovery, wildcards.get("study")))

    @cache  # noqa: B019 - one plan lives as long as the process, and thousands of cells share a method
    def _fingerprint(
        self, stage: str, method: str | None, allocation: str | None, recovery: str | None, study: str | None
    ) -> tuple[str, ...]:
        script, _, kind = stage.partition("_")
        of_kind = (script, kind) in OF_KINDS
        entries = [f"{script}.py", EVALUATIONS.module(kind)] if of_kind else [f"{stage}.py"]
        entries += [STUDIES.module(study)] if study else []
        if allocation is not None:
            entries.append(ALLOCATIONS.module(allocation))
        if recovery is not None:
            entries.append(RECOVERIES.module(self.preset("recoveries", recovery).kind))
        if method is not None:
            kinds = _kinds(self.preset("methods", method).model_dump())
            entries += [STRUCTURES.module(kind) for kind in kinds if kind in STRUCTURES]
            if stage == "factorize":
                entries += [METRICS.module(kind) for kind in kinds if kind in METRICS]
        return self.code.fingerprint(*entries)

    def params(self, stage: str, wildcards: dict[str, str]) -> dict[str, Any]:
        """All that a stage is recorded with, besides its input files."""
        return {
            "spec": self.spec(stage, wildcards),
            "code": self.fingerprint(stage, wildcards),
            "versions": self.versions(stage, wildcards),
            "files": self.outside.files(stage, wildcards),
        }

    def versions(self, stage: str, wildcards: dict[str, str]) -> dict[str, str]:
        """Versions of the libraries that a job uses. Raises InputError for one that is not installed."""
        return versions(*STAGES[stage], *self._libraries(stage, wildcards))

    def _libraries(self, stage: str, w: dict[str, str]) -> tuple[str, ...]:
        """What some jobs of a stage use and others do not, as their preset says."""
        if stage == "recover":
            return self.preset("recoveries", w["recovery"]).libraries
        of_texts = stage == "retrieve_text" and self.preset("texts", w["text"]).dataset
        of_rows = stage == "retrieve_examples" and self.tasks()[w["task"]].dataset
        return ("datasets",) if of_texts or of_rows else ()

    def _spec_retrieve_model(self, w: dict[str, str]) -> dict[str, Any]:
        if self.tuned(w["model"]):  # what `finetune` made
            return {"source": f"results/{w['model']}/tuned", "revision": None}
        return self._spec_retrieve_base(w)

    def _spec_retrieve_base(self, w: dict[str, str]) -> dict[str, Any]:
        model = self.preset("models", w["model"])
        return {"source": model.source, "revision": model.revision}

    def _spec_retrieve_examples(self, w: dict[str, str]) -> dict[str, Any]:
        return self.tasks()[w["task"]].rows()

    def _spec_finetune(self, w: dict[str, str]) -> dict[str, Any]:
        tuning = self.preset("models", w["model"]).finetune
        return {**tuning.model_dump(), "length": self.task(tuning.task).length}

    def _spec_retrieve_text(self, w: dict[str, str]) -> dict[str, Any]:
        return self.preset("texts", w["text"]).model_dump()

    def _spec_tokenize(self, w: dict[str, str]) -> dict[str, Any]:
        section = "calibrations" if w["windows"] in self.names["calibrations"] else "evaluations"
        preset = self.preset(section, w["windows"])
        windows = preset.model_dump(exclude={"kind", "text", "task", "compare", *OF_STATISTICS})
        if section == "evaluations":
            windows["version"] = PROTOCOLS[preset.protocol].version
        return {"kind": section, "join": self.config.texts[preset.text].join, **windows}

    def _spec_tokenize_rows(self, w: dict[str, str]) -> dict[str, Any]:
        return self.preset("calibrations", w["windows"]).model_dump(include={"windows", "length", "seed"})

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
        return method.model_dump(exclude=UNNAMED | {"allocation"}) | {  # which is the budget's by then
            "structure_version": STRUCTURES[method.structure.kind].version,
            "metric_version": METRICS[metric.kind].version if metric else None,
        }

    def _spec_factorize(self, w: dict[str, str]) -> dict[str, Any]:
        return {"method": self._method(w), "shard": w["shard"]}

    def _spec_measure_spectra(self, w: dict[str, str]) -> dict[str, Any]:
        return {"metric": self.preset("methods", w["method"]).objective}

    def _spec_predict_losses(self, w: dict[str, str]) -> dict[str, Any]:
        return {"structure": self._method(w)["structure"], "structure_version": self._method(w)["structure_version"]}

    def _spec_predict_in_rounds(self, w: dict[str, str]) -> dict[str, Any]:
        allocation = self.allocation(w["budget"])
        return {
            **self._spec_predict_losses(w),
            **self._spec_collect_gradients(w),
            "budget": self.preset("budgets", w["budget"]).model_dump(),
            "rounds": allocation.rounds(),
            "allocation": {"version": allocation.version, "libraries": versions(*allocation.libraries)},
        }

    def _spec_learn_sizes(self, w: dict[str, str]) -> dict[str, Any]:
        allocation = self.allocation(w["budget"])
        return {
            **self._spec_predict_losses(w),
            "dtype": self.preset("models", w["model"]).dtype,
            "budget": self.preset("budgets", w["budget"]).model_dump(),
            "allocation": {"version": allocation.version, "libraries": versions(*allocation.libraries)},
        }

    def _spec_compress(self, w: dict[str, str]) -> dict[str, Any]:
        sections = ("models", "calibrations", "methods", "budgets")
        names = {s.removesuffix("s"): self.names[s][w[s.removesuffix("s")]] for s in sections}
        names["calibration"] = self.preset_of_seed[names["calibration"]]
        names["budget"] = self.budget_name(names["budget"])
        model, calibration = self.preset("models", w["model"]), self.preset("calibrations", w["calibration"])
        allocation = self.allocation(w["budget"])
        return {
            "names": names,
            "allocation": {"version": allocation.version, "libraries": versions(*allocation.libraries)},
            "dtype": model.dtype,
            "presets": {
                "model": model.model_dump(exclude=EXECUTION),
                "calibration": calibration.model_dump(exclude_none=True),
                "calibration_text": self._calibration_text(calibration),
                "method": self._method(w),
                "budget": self.preset("budgets", w["budget"]).model_dump(),
            },
        }

    def _calibration_text(self, calibration: Calibration) -> dict[str, Any]:
        """Where the words of a calibration come from, for the recipe."""
        if calibration.text is None:
            task = self.task(str(calibration.task))
            hub = {"subset": task.subset, "split": task.train_split, "revision": task.revision} if task.dataset else {}
            return {"files": task.train, "dataset": task.dataset, **hub, "columns": task.columns}
        return self.config.texts[calibration.text].model_dump(exclude_defaults=True, mode="json")

    def _recovery(self, label: str) -> dict[str, Any]:
        """The options of a recovery, and in the place of a name those of the one that it goes on from."""
        recovery = self.preset("recoveries", label)
        after = {"after": self._recovery(self.labels["recoveries"][recovery.after])} if recovery.after else {}
        return {**recovery.model_dump(exclude={"after"}), **after}

    def _spec_export_dense(self, w: dict[str, str]) -> dict[str, Any]:
        steps = ("model", "calibration", "method", "budget", "recovery")
        made = "/".join(["results", *(w[step] for step in steps if step in w), "dense_export/manifest.json"])
        return {"dtype": self.export_dtypes.get(made, "original")}

    def _spec_recover(self, w: dict[str, str]) -> dict[str, Any]:
        recovery = self.preset("recoveries", w["recovery"])
        model, calibration = self.preset("models", w["model"]), self.preset("calibrations", w["calibration"])
        return {
            "name": self.names["recoveries"][w["recovery"]],
            "recovery": self._recovery(w["recovery"]),
            **({"length": self.task(recovery.task).length} if isinstance(recovery, Finetune.Options) else {}),
            "version": RECOVERIES[recovery.kind].version,
            "first_token": calibration.first_token,
            "dtype": model.dtype,
        }

    def _evaluate(self, kind: str, w: dict[str, str]) -> dict[str, Any]:
        """What a measurement depends on, and not what it runs on: device, threads and kernels are in the result."""
        evaluation = EVALUATIONS.build(self.preset("evaluations", w["evaluation"]).model_dump())
        recovery = {"recovery": self._recovery(w["recovery"])} if "recovery" in w else {}
        given = {"name": self.names["evaluations"][w["evaluation"]], "kind": kind}
        return {**given, **evaluation.spec(), **recovery, "dtype": self.preset("models", w["model"]).dtype}

    def _spec_retrieve_tasks(self, w: dict[str, str]) -> dict[str, Any]:
        return self.preset("evaluations", w["evaluation"]).model_dump(exclude={"kind"})

    def _spec_demo_model(self, w: dict[str, str]) -> dict[str, Any]:
        return DEMO_MODEL

    def _spec_report(self, w: dict[str, str]) -> dict[str, Any]:
        return {"template": file_digest(TEMPLATE), "cells": len(self.cells_of("perplexity"))}

    def _spec_cards(self, w: dict[str, str]) -> dict[str, Any]:
        """{card: the checkpoint that it describes, and {evaluation: the artefacts for it and for the dense model}}."""
        cards: dict[str, Any] = {}
        for cell in (cell for cell in self.cells_of("perplexity") if cell.method):
            found = cards.setdefault(f"{self.recovered(cell)}/README.md", {"checkpoint": self.made(cell), "evaluations": {}})
            dense = self.result(Cell(cell.model, cell.evaluation))
            found["evaluations"][cell.evaluation] = {"compressed": self.result(cell), "dense": dense}
        return {"cards": cards}

    def _spec_measure_study(self, w: dict[str, str]) -> dict[str, Any]:
        spec = {"study": w["study"], "dtype": self.preset("models", w["model"]).dtype}
        if "checkpoints" in study_of(w["study"]).reads:
            spec["checkpoints"] = self.study_checkpoints(w["study"], w["model"])
        return spec

    def _spec_conclude_study(self, w: dict[str, str]) -> dict[str, Any]:
        """The claims, the rows of the study's cells under its own names of presets, and {model: measurement}."""
        cells = self.study_cells(w["study"])
        return {
            "claims": [c.model_dump() for c in read_claims(self.code.root / CLAIMS) if c.study == w["study"]],
            "rows": [{**self._row(cell), **own} for cell, own in cells],
            "scores": [{**self._row(cell), **own} for cell, own in self.study_scores(w["study"])],
            "measured": {model: self.study_measurement(w["study"], cell) for model, cell in self.study_models().items()},
            "template": [file_digest(STUDY_TEMPLATE), file_digest(PARTS)],
        }

    def _spec_studies(self, w: dict[str, str]) -> dict[str, Any]:
        """What the page of all papers says of each study that its folder does not hold."""
        all_of = {name: study_of(name) for name in self.of_studies}
        keys = ("title", "reference", "tables", "figures")
        described = {name: {key: getattr(study, key) for key in keys} for name, study in all_of.items()}
        return {"studies": described, "template": [file_digest(STUDIES_TEMPLATE), file_digest(PARTS)]}

    def study_measurement(self, study: str, cell: Cell) -> str:
        """The path of what a study measures on a model's weights and statistics."""
        return f"{self.folder(cell, 'models', 'calibrations')}/studies/{study}.json"

    def _spec_tables(self, w: dict[str, str]) -> dict[str, Any]:
        return {"rows": [self._row(cell) for cell in self.cells_of("perplexity")]}

    def _tabulate(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "rows": [self._row(cell) for cell in self.cells_of(kind)]}

    def _row(self, cell: Cell) -> dict[str, Any]:
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
            "result": self.result(cell),
        }
