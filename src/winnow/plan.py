"""From the grid to stages: what the result of every stage depends on, besides its input files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from winnow.config import Config
from winnow.grid import EXECUTION, UNNAMED, Cell, Grid
from winnow.io import file_digest
from winnow.metrics import METRICS
from winnow.provenance import CodeTracker, versions
from winnow.structures import STRUCTURES
from winnow.tokens import PROTOCOLS

TORCH = ("torch", "numpy", "safetensors")
HUGGING_FACE = (*TORCH, "transformers", "tokenizers")
TABLES = ("numpy", "pandas", "pyarrow")
TASKS = ("datasets", "lm-eval")
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
    "predict_losses": (*TORCH, *TABLES),
    "predict_in_rounds": (*HUGGING_FACE, *TABLES),
    "compress": (*TORCH, *TABLES),
    "export_dense": HUGGING_FACE,
    "evaluate_perplexity": HUGGING_FACE,
    "evaluate_latency": HUGGING_FACE,
    "retrieve_tasks": TASKS,
    "evaluate_accuracy": (*HUGGING_FACE, *TASKS),
    "cards": (),
    "tables": TABLES,
    "tabulate_accuracy": TABLES,
    "tabulate_latency": TABLES,
    "figures": ("matplotlib", *TABLES),
    "report": ("jinja2", *TABLES),
    "demo_texts": (),
    "demo_model": HUGGING_FACE,
}
ALLOCATING = ("predict_in_rounds", "compress")  # stages that reach the file of the budget's allocation
DENSE = {"evaluate_dense": "evaluate_perplexity", "evaluate_accuracy_dense": "evaluate_accuracy"}  # rules by the same script
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
OF_STATISTICS = {"precision", "first_token", "gradient_labels"}  # options of a calibration that do not change its tokens


def _kinds(content: dict[str, Any]) -> list[str]:
    """All kinds in a resolved preset, nested ones too, each once."""
    inner = [kind for value in content.values() if isinstance(value, dict) for kind in _kinds(value)]
    return list(dict.fromkeys([*([content["kind"]] if "kind" in content else []), *inner]))


class Plan(Grid):
    """Cells and stages of a validated configuration; knows nothing of Snakemake and starts no job."""

    def __init__(self, config: Config, root: Path, memory: Path | None = None):
        """`root`: the checkout, whose code is tracked; `memory`: a folder where digests of code are kept."""
        super().__init__(config)
        self.code = CodeTracker(root, memory)

    def spec(self, stage: str, wildcards: dict[str, str]) -> dict[str, Any]:
        """The parameters of a stage: builtin types only, keys sorted."""
        of_stage = getattr(self, f"_spec_{stage}", None)
        return json.loads(json.dumps(of_stage(wildcards) if of_stage else {}, sort_keys=True))

    def fingerprint(self, stage: str, wildcards: dict[str, str]) -> list[str]:
        """Digests of the stage's script and of every project module that it reaches."""
        return list(self._fingerprint(stage, wildcards.get("method"), wildcards.get("budget") if stage in ALLOCATING else None))

    @cache  # noqa: B019 - one plan lives as long as the process, and thousands of cells share a method
    def _fingerprint(self, stage: str, method_label: str | None, budget_label: str | None) -> tuple[str, ...]:
        entries = [f"{stage}.py"]
        if budget_label is not None:
            entries.append(f"winnow.allocations.{self.allocation(budget_label).kind()}")
        if method_label is not None:
            kinds = _kinds(self.preset("methods", method_label).model_dump())
            entries += [f"winnow.structures.{kind}" for kind in kinds if kind in STRUCTURES]
            metrics = [METRICS[kind].__name__ for kind in kinds if kind in METRICS]
            if stage == "factorize" and metrics:
                entries.append(f"winnow.metrics:{metrics[0]}" if len(metrics) == 1 else "winnow.metrics")
        return self.code.fingerprint(*entries)

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
        windows = preset.model_dump(exclude={"kind", "text", "compare", *OF_STATISTICS})
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

    def _spec_compress(self, w: dict[str, str]) -> dict[str, Any]:
        sections = ("models", "calibrations", "methods", "budgets")
        names = {s.removesuffix("s"): self.names[s][w[s.removesuffix("s")]] for s in sections}
        names["calibration"] = self.preset_of_seed[names["calibration"]]
        model, calibration = self.preset("models", w["model"]), self.preset("calibrations", w["calibration"])
        allocation = self.allocation(w["budget"])
        return {
            "names": names,
            "allocation": {"version": allocation.version, "libraries": versions(*allocation.libraries)},
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

    def _spec_evaluate_latency(self, w: dict[str, str]) -> dict[str, Any]:
        """What is run, and not on what: device, threads and kernels are in the result, and times are never the same bits."""
        spec = self.preset("evaluations", w["evaluation"]).model_dump(exclude={"kind"})
        recovery = {"recovery": self.preset("recoveries", w["recovery"]).model_dump()} if "recovery" in w else {}
        return {**spec, **recovery, "dtype": self.preset("models", w["model"]).dtype}

    def _spec_retrieve_tasks(self, w: dict[str, str]) -> dict[str, Any]:
        return self.preset("evaluations", w["evaluation"]).model_dump(exclude={"kind"})

    def _spec_evaluate_accuracy(self, w: dict[str, str]) -> dict[str, Any]:
        recovery = {"recovery": self.preset("recoveries", w["recovery"]).model_dump()} if "recovery" in w else {}
        return {**self._spec_retrieve_tasks(w), **recovery, "dtype": self.preset("models", w["model"]).dtype}

    def _spec_demo_model(self, w: dict[str, str]) -> dict[str, Any]:
        return DEMO_MODEL

    def _spec_report(self, w: dict[str, str]) -> dict[str, Any]:
        return {"template": file_digest(TEMPLATE), "cells": len(self.cells_of("perplexity"))}

    def _spec_cards(self, w: dict[str, str]) -> dict[str, Any]:
        """{card: the checkpoint that it describes, and {evaluation: the artefacts for it and for the dense model}}."""
        cards: dict[str, Any] = {}
        for cell in (cell for cell in self.cells_of("perplexity") if cell.method):
            folder = self.folder(cell, "models", "calibrations", "methods", "budgets")
            path = f"{self.folder(cell, 'models', 'calibrations', 'methods', 'budgets', 'recoveries')}/README.md"
            found = cards.setdefault(path, {"checkpoint": f"{folder}/checkpoint/manifest.json", "evaluations": {}})
            dense = self.result(Cell(cell.model, cell.evaluation))
            found["evaluations"][cell.evaluation] = {"compressed": self.result(cell), "dense": dense}
        return {"cards": cards}

    def _spec_tables(self, w: dict[str, str]) -> dict[str, Any]:
        return {"rows": [self._row(cell) for cell in self.cells_of("perplexity")]}

    def _spec_tabulate_latency(self, w: dict[str, str]) -> dict[str, Any]:
        return {"rows": [self._row(cell) for cell in self.cells_of("latency")]}

    def _spec_tabulate_accuracy(self, w: dict[str, str]) -> dict[str, Any]:
        return {"rows": [self._row(cell) for cell in self.cells_of("accuracy")]}

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
            "budget": cell.budget or "dense",
            "allocation": budget.allocation.kind if budget else "none",
            "recovery": cell.recovery or "none",
            "evaluation": cell.evaluation,
            "targets": "+".join(budget.targets) if budget else "none",
            "keep_requested": budget.keep_bytes if budget else 1.0,
            "result": self.result(cell),
        }
