"""Reference tables of the typed configuration, as Markdown: for config/README.md, and for the pages of the documentation."""

from __future__ import annotations

import json
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from winnow.allocation.base import ALLOCATIONS
from winnow.allocation.times import Timing
from winnow.calibration.few_tokens import ENOUGH
from winnow.data.tokens import PROTOCOLS
from winnow.evaluation.base import EVALUATIONS
from winnow.metrics.base import METRICS
from winnow.models.architectures import ARCHITECTURES
from winnow.planning import presets
from winnow.planning.config import Config, Method
from winnow.recovery.base import RECOVERIES
from winnow.registry import Registry
from winnow.structures.base import STRUCTURES
from winnow.structures.low_rank import LowRank
from winnow.studies.base import STUDIES
from winnow.training.options import Tuning

ALLOCATED = [
    "All meet `keep_bytes` within 0.5 % of the dense bytes (`ilp` with `time` may store less) and never exceed it; a matrix that",
    "stays dense counts with its dense bytes, and allocation.json lists it with size null. The predicted loss of a size is",
    "1/2 tr(F D C D^T) nats per token: D is",
    "the change of the matrix, C the second moment of its input (with one additional token at what channels typically",
    "reach at most, so that unseen directions are not free), F that of the gradient of the loss at its output; both as expected",
    f"for other text if there are fewer than {ENOUGH} calibration tokens per channel. It takes one",
    "backward pass over the calibration windows, which budgets with other objectives do not need; structures with it: "
    + ", ".join(f"`{kind}`" for kind, cls in STRUCTURES.items() if cls.predicts)
    + ". `learned` sizes",
    "are trained by a separate job for every method and budget (rule `learn_sizes`), for the structures "
    + ", ".join(f"`{kind}`" for kind, cls in STRUCTURES.items() if issubclass(cls, LowRank))
    + "; learned.json",
    "beside allocation.json has the loss, the bytes and the dense matrices at every evaluation on the held-out windows.",
]
TEXTS = [
    "Files that end in `.jsonl` (or `.ndjson`) and `.parquet` need no `format`, and another one is refused; so are compressed",
    "files, and `.csv` and the like. A file with any other name is plain text, `raw`, unless `format` is set; one whose lines",
    "are JSON objects is refused without a `format`.",
    "",
    "Protocols score the rows joined by `join`, so perplexities depend on the rows. Papers use the lines of WikiText as rows,",
    "like the hub's data set (`Salesforce/wikitext`, `wikitext-2-raw-v1`). The original files (`wiki.test.raw`) need `format:",
    "lines` for this: as one row each they have fewer newlines and another perplexity. A file of that name is therefore refused",
    "without a `format`; a WikiText file with another name must have the right one.",
]
CALIBRATED = [
    f"With fewer than {ENOUGH} tokens per channel of a matrix's input, fits to the second moment lose more on other text than on",
    "these tokens, and much more with fewer tokens than channels. `snakemake plan`, the log of the job `collect_statistics` and",
    "the report name the inputs and the number of windows needed; predicted losses are then those expected on other text.",
]


STUDIED = [
    "By default a measurement ends within about an hour on two cores for a model of 135 million numbers; `snakemake plan` says",
    "how long it takes on yours. One that is interrupted goes on after the last piece that it had finished.",
]
SYMBOLS = [
    "Presets of `config/config.yaml`, with their papers. m and n are the outputs and inputs of a matrix, d and f the",
    "width and the hidden width of an FFN, k is the size that a budget determines. Indices take 2 bytes each (4 from",
    "32,768 channels on).",
]


def section(name: str) -> list[str]:
    """All that is said of a section of the configuration: what it is, its keys, and its kinds."""
    field = Config.model_fields[name]
    lines = [f"{field.description}."]
    registry: Any = {"evaluations": EVALUATIONS, "recoveries": RECOVERIES}.get(name)
    if name == "studies":
        for kind, cls in STUDIES.items():
            lines += ["", f"`{kind}`: {cls.title} ({cls.reference})", "", *_key_rows(cls.Options)]
        return [*lines, "", *STUDIED]
    if registry is None:
        lines += ["", *_key_rows(typing.get_args(field.annotation)[1])]
    for kind, cls in (registry or {}).items():
        lines += ["", f"`kind: {kind}`: {' '.join(str(cls.__doc__).split())}", "", *_key_rows(cls.Options)]
        if kind == "perplexity":
            lines += ["", *protocol_rows()]
    if name == "models":
        about = " ".join(str(Tuning.__doc__).split())
        lines += ["", f"`finetune` (fine-tuning before compression; the recovery of that name fine-tunes again): {about}"]
        lines += ["", *_key_rows(Tuning), "", *_families()]
    if name == "budgets":
        lines += ["", "Allocations:", "", *_kind_rows(ALLOCATIONS, "reference"), "", *ALLOCATED]
        lines += ["", f"`time` of `ilp`: {' '.join(str(Timing.__doc__).split())}", "", *_key_rows(Timing)]
    if name == "methods":
        lines += ["", "Structures:", "", *_kind_rows(STRUCTURES, "stores"), "", "Metrics:", "", *_kind_rows(METRICS, "reference")]
        lines += ["", *SYMBOLS, "", *preset_rows()]
    return lines + {"texts": ["", *TEXTS], "calibrations": ["", *CALIBRATED]}.get(name, [])


def structure(kind: str) -> list[str]:
    """All that is said of a structure: what it is, what it stores, its options, and the presets that use it."""
    cls = STRUCTURES[kind]
    measured = {"metric": "the metric of the method", "ffn_output": "the FFN's output on the calibration tokens"}
    used = [name for name, content in presets.methods().items() if content["structure"]["kind"] == kind]
    return [
        " ".join(str(cls.__doc__).split()),
        "",
        f"- Follows: {cls.reference}",
        f"- Stores: {cls.stores}",
        f"- Numbers stored: {cls.formula}",
        f"- Its fit minimises the error of: {measured[cls.objective]}",
        f"- Predicts losses, which the allocation `ilp` needs: {'yes' if cls.predicts else 'no'}",
        f"- Engines (`runtime` of the allocation `ilp`): {', '.join(f'`{name}`' for name in cls.engines)}",
        f"- Presets: {', '.join(f'`{name}`' for name in used) or 'none'}",
        "",
        *_key_rows(cls.Options),
    ]


def protocol_rows() -> list[str]:
    """The table of protocols."""
    rows = ["| protocol | version | rule |", "|---|---|---|"]
    return rows + [f"| `{key}` | {protocol.version} | {protocol.rule} |" for key, protocol in PROTOCOLS.items()]


def _families() -> list[str]:
    """The supported families, and how to add one."""
    named = ", ".join(f"`{name}`" for name in sorted(ARCHITECTURES))
    return [
        f"Families, by the `model_type` of `config.json` (not by the name of a folder): {named}.",
        "",
        "The transformers class is the one that `architectures` in `config.json` names: a causal language model, a masked one, a",
        "classifier, or the encoder alone. Perplexity is for models that predict the next token; an encoder has none.",
        "",
        "Tensors are matched by the rules of transformers: whatever it loads completely is accepted, for example only the",
        "embedding or only the head of a tied model. Tensors of other heads are named in the log of `retrieve_model` and left",
        "out of the checkpoints. Refused, with a remedy: quantised weights, a `quantization_config` left over after merging to",
        "16 bits (delete the key: transformers would load another model than the one that is compressed), other keys that",
        "change what is computed (listed in `src/winnow/models/config_json.py`), and compressed checkpoints of winnow (export",
        "them). The tokenizer must have a vocabulary, and the model an embedding for each of its tokens (or more); a text of",
        "mostly unknown tokens, or with all windows identical, stops the run.",
        "",
        "To add a family, add an entry to `ARCHITECTURES` in `src/winnow/models/architectures.py`, which is only data:",
        "`layers`, the list of layers; `modules`, the module of each role below a layer; `activation`, that of the FFN; and if",
        "needed `transposed` (weights stored as in, out), `positions` (rows of the position embeddings that no token uses),",
        "`experts` and `expert_modules` (a mixture). Then add a tiny configuration to `TINY` in `tests/conftest.py`;",
        "`tests/unit/test_architectures.py` checks the rest.",
        "",
        "A fused matrix is one matrix with its own role: `qkv_proj`, and `gate_up_proj`, which structures of whole FFNs split",
        "and join again. The experts of a mixture are separate matrices. If the fit needs statistics, an expert with fewer",
        "calibration tokens than inputs of the matrix stays dense: it is not part of the budget, and allocation.json,",
        "recipe.yaml and the checkpoint's README list it. In metrics with gradients all experts stay dense, and `coupled` does",
        "not support them.",
    ]


def _key_rows(model: type[BaseModel]) -> list[str]:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in model.model_fields.items():
        text = "required" if field.is_required() else f"`{_default(field)}`"
        about = field.description or (f"names from the section `{key}`" if key in Config.model_fields else _own_kind(model))
        rows.append(f"| `{key}` | {text} | {about} |")
    return rows


def _own_kind(model: type[BaseModel]) -> str:
    """What the key `kind` of a plug-in must say."""
    return f"`{typing.get_args(model.model_fields['kind'].annotation)[0]}`"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return json.dumps(value.model_dump() if isinstance(value, BaseModel) else value)


def _kind_rows(registry: Registry[Any], column: str) -> list[str]:
    rows = [f"| kind | options | {column} | what it is |", "|---|---|---|---|"]
    for kind, cls in registry.items():
        fields = [(key, f) for key, f in cls.Options.model_fields.items() if key != "kind"]
        options = "; ".join(f"`{key}` ({_default(f)}): {f.description}" for key, f in fields) or "none"
        what = " ".join(str(cls.__doc__).split())
        rows.append(f"| `{kind}` | {options} | {getattr(cls, column)} | {what} |")
    return rows


def preset_rows() -> list[str]:
    rows = ["| preset | paper | metric | structure | what is stored | numbers stored |", "|---|---|---|---|---|---|"]
    for name, content in presets.methods().items():
        method = Method.model_validate(content)
        structure = STRUCTURES[method.structure.kind]
        given = [f"{key}: {_short(value)}" for key, value in content["structure"].items() if key != "kind"]
        what = f"{structure.kind()} ({', '.join(given)})" if given else structure.kind()
        options = [f"{key} {value}" for key, value in content.get("metric", {}).items() if key != "kind"]
        metric = f"{method.objective} ({', '.join(options)})" if options else method.objective
        rows.append(f"| `{name}` | {method.paper} | {metric} | {what} | {structure.stores} | {structure.formula} |")
    return rows


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{', '.join(str(_short(part)) for part in value)}]"
    return value["kind"] if isinstance(value, dict) else value
