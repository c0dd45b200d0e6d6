"""README of a checkpoint: recipe, bytes, how to load it, and, once measured, its results beside those of the dense model. It is
a Hugging Face model card, so that the folder can be uploaded as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from winnow.checkpoint.measured import Measured, eval_results
from winnow.io.local_paths import named

if TYPE_CHECKING:
    from winnow.checkpoint.recipe import WrittenRecipe
    from winnow.io.specs import Preset

UNMEASURED = """Results are measured on the finished checkpoint, after this card is written. `snakemake cards` writes a card with
results beside the evaluations; `python -m winnow {command} <checkpoint> <new directory>` writes a folder with results in its
README.md, if there are evaluations beside the checkpoint."""
WITH_WINNOW = """```python
import winnow  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory")
```

Needs winnow {winnow} or a newer version that reads checkpoint format {format}; transformers alone refuses the directory."""
WITHOUT_WINNOW = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory")
```

Does not need winnow: every compressed matrix is expanded to its dense shape, so any tool that reads the dense model reads this
one. It is as large and as slow as the dense model: {exported:,} bytes of weights (dense {dense:,}, compressed {compressed:,}).
The matrices are stored in {dtype}, with a relative rounding error of {error:.1e}."""

PACKED = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory")
```

Needs the package compressed-tensors, not winnow. Every compressed matrix is stored in its format `pack-quantized`, with the codes
and scales of the checkpoint: {exported:,} bytes of weights (dense {dense:,}, checkpoint {compressed:,}). transformers multiplies
the matrices out before the first call, and then needs the memory of the dense model. In {dtype}, this has a relative rounding
error of {error:.1e}; in float32 there is none, and in float16 the matrices are those that winnow computes. {engine}."""


@dataclass(frozen=True)
class Exported:
    """An export: bytes of its weights, dtype of its matrices, and their relative rounding error. For the card: `form` says what
    it is written as, and `use` how it is loaded, with the numbers that the card knows in braces. `said`: the same in one line, to
    be printed after the bytes. `engine`: what an engine does with it, where that depends on the checkpoint."""

    bytes: int
    dtype: str
    error: float
    form: str
    use: str
    said: str
    engine: str = ""


def card(recipe: WrittenRecipe, measured: list[Measured] | None = None, exported: Exported | None = None) -> str:
    """The text of the card. `recipe`: content of recipe.yaml; `exported`: given if the card is for an export."""
    dense, recipe = exported is not None, named(recipe)
    how, written = (exported.use, f", {exported.form}") if exported else (WITH_WINNOW, "")
    sizes: dict[str, Any] = {"dense": recipe["model_dense_bytes"], "compressed": recipe["model_stored_bytes"]}
    if exported:
        sizes |= {"exported": exported.bytes, "dtype": exported.dtype, "error": exported.error, "engine": exported.engine}
    parts = [
        f"# {recipe['names']['model']}, compressed by winnow{written}",
        "## Use",
        how.format(winnow=recipe["winnow"], format=recipe.get("format_version", 1), **sizes),
        "## Recipe",
        *_recipe(recipe, dense),
        "## Measured",
        *(_numbers(measured, dense) if measured else [UNMEASURED.format(command="export" if dense else "share")]),
    ]
    return _with_metadata(recipe, measured or [], "\n\n".join(parts) + "\n")


def _with_metadata(recipe: WrittenRecipe, measured: list[Measured], text: str) -> str:
    """The text below the metadata for a hub: the measured numbers, and the base model only if it is from a hub (then it has a
    pinned revision)."""
    from huggingface_hub import ModelCard, ModelCardData

    results = eval_results(measured)
    data = ModelCardData(
        library_name="transformers",
        tags=["winnow", "compressed"],
        base_model=recipe["model"]["source"] if recipe["model"].get("revision") else None,
        model_name=recipe["names"]["model"] if results else None,  # of the results; a card without any has none
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _options(preset: Preset | None) -> str:
    """`kind` and options in one line."""
    if preset is None:
        return "none: the error of the FFN's output is minimised"
    given = ", ".join(f"{key} {_short(value)}" for key, value in preset.items() if key != "kind" and value is not None)
    return f"`{preset['kind']}`" + (f" ({given})" if given else "")


def _short(value: Any) -> str:
    if isinstance(value, dict):  # a preset, or {target: something}
        return _options(value) if "kind" in value else ", ".join(f"{key}: {_short(of)}" for key, of in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)


def _calibration(recipe: WrittenRecipe) -> list[tuple[str, str]]:
    preset = recipe.get("calibration")
    if preset is None:
        return []
    text = recipe.get("calibration_text", {})
    where = text.get("dataset") or ", ".join(text.get("files", [])) or "?"
    details = [text[key] for key in ("subset", "split") if text.get(key)]
    revision = f", revision `{text['revision']}`" if text.get("revision") else ""
    name = preset.get("text") or f"train rows of {preset['task']}"
    return [
        ("calibration text", f"{name}: {' '.join([where, *details])}{revision}"),
        ("calibration windows", f"{preset['windows']} of {preset['length']} tokens, seed {preset['seed']}"),
    ]


def _recovery(recipe: WrittenRecipe) -> list[tuple[str, str]]:
    """The recovery that followed compression, if one did."""
    preset = {key: value for key, value in recipe.get("recovery", {}).items() if key != "name"}
    return [("recovery, on the calibration windows", _options(preset))] if preset else []


def _sizes(recipe: WrittenRecipe) -> str:
    """The sizes by role, as ranges over layers; recipe.yaml has the size of every layer."""
    by_role: dict[str, list[int]] = {}
    for group, size in recipe["sizes"].items():
        by_role.setdefault(re.sub(r"^[\d-]+\.", "", group), []).append(size)
    spans = {role: (min(found), max(found), len(found)) for role, found in by_role.items()}
    return "; ".join(f"{role} {low if low == high else f'{low} to {high}'} ({n}x)" for role, (low, high, n) in spans.items())


def _dequantized(recipe: WrittenRecipe) -> list[tuple[str, str]]:
    """That the dense model is one that was quantised already."""
    if (made := recipe.get("dequantized")) is None:
        return []
    types = ", ".join(f"{count} tensors {kind}" for kind, count in made["types"].items())
    file = f"`{made['file']}`, SHA-256 {made['sha256'][:16]}"
    return [("dense model", f"dequantised once from {made['type']} ({types}) to {made['dtype']}; GGUF file {file}")]


def _recipe(recipe: WrittenRecipe, dense: bool) -> list[str]:
    model, method, budget = recipe["model"], recipe["method"], recipe["budget"]
    revision = f", revision `{model['revision']}`" if model.get("revision") else ""
    share = recipe["stored_bytes"] / recipe["dense_bytes"]
    asked = [f"{key} {_short(budget[key])}" for key in ("keep_bytes", "rank", "rank_fraction") if budget.get(key) is not None]
    allocation = [f"allocation `{budget['allocation']['kind']}`"] if budget.get("allocation") else []
    whole = f"{recipe['model_stored_bytes']:,} of {recipe['model_dense_bytes']:,}"
    rows = [
        ("model", f"`{model['source']}`{revision}"),
        *_dequantized(recipe),
        ("structure", _options(method["structure"])),
        ("metric", _options(method["metric"])),
        ("compressed", ", ".join(budget["targets"])),
        ("budget", ", ".join([*asked, *allocation]) or "none"),
        *_calibration(recipe),
        *_recovery(recipe),
        ("sizes (ranks, neurons, positions in `bits`)", _sizes(recipe) or "none"),
        ("bytes of the compressed matrices", f"{recipe['stored_bytes']:,} of {recipe['dense_bytes']:,} ({share:.2%})"),
        ("bytes of all weights", whole),
        ("written by", f"winnow {recipe['winnow']}, checkpoint format {recipe.get('format_version', 1)}"),
    ]
    table = "\n".join(["| what | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    own = "Bytes are those of the compressed checkpoint of this export.\n" if dense else ""
    left = [f"- `{name}`: {tokens:,} tokens" for name, tokens in recipe.get("left_dense", {}).items()]
    kept = recipe.get("kept_dense", {})
    few = "Parts of experts that stay dense, since they received fewer calibration tokens than they have inputs:"
    return [
        table,
        *([f"The allocation keeps {len(kept)} matrices or groups dense: {', '.join(kept)}."] if kept else []),
        *(["\n".join([few, "", *left])] if left else []),
        own + "`recipe.yaml` has every parameter, `manifest.json` the digests of all files and of their inputs.",
    ]


def _numbers(measured: list[Measured], dense: bool) -> list[str]:
    head = "| evaluation | model | loss (nats per token) | above dense | perplexity | KL to dense | top-1 agreement |"
    rows, protocols = [head, "|---|---|---:|---:|---:|---:|---:|"], []
    for m in measured:
        base, own, protocol, text = m.dense, m.compressed, m.compressed["protocol"], m.compressed["text"]
        loss = "| {} | {} | {nll:.4f} ± {nll_se:.4f} "
        rows.append(loss.format(m.evaluation, "dense", **base) + f"| | {base['perplexity']:.3f} | | |")
        kl = f"{own['kl']:.4f}" if "kl" in own else ""
        agreement = f"{own['top1_agreement']:.1%}" if "top1_agreement" in own else ""
        above = f"{own['delta_nll']:.4f} ± {own['delta_nll_se']:.4f}"
        rows.append(loss.format("", "compressed", **own) + f"| {above} | {own['perplexity']:.3f} | {kl} | {agreement} |")
        protocols.append(
            f"- `{m.evaluation}`: protocol {protocol['protocol']} version {protocol['protocol_version']}, {own['windows']} "
            f"windows of {protocol['length']} tokens, {own['tokens']:,} scored, in {protocol['dtype']}, "
            f"{'with' if text['bos'] else 'without'} a leading BOS; text of {text['text_tokens']:,} tokens, "
            f"SHA-256 {text['text_digest'][:16]}"
        )
    note = "± is one standard error over windows; the difference to dense is paired by window."
    if dense:
        note += (
            " Measured on the compressed checkpoint; the logits of this export are the same up to the rounding given above if "
            "both are run in the same dtype."
        )
    return ["\n".join(rows), note, "\n".join(protocols)]
