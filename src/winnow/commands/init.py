"""A configuration for a model of one's own, written from what the model's files say."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnow.commands.planned import checkout
from winnow.commands.suggested import FEWEST, Suggested, of_model, precision_of, texts_of, tokens_of, windows_of
from winnow.errors import InputError
from winnow.io.artifacts import atomic
from winnow.models.architectures import TARGETS
from winnow.options import LONGEST
from winnow.planning.config import load
from winnow.planning.config_files import dumped
from winnow.planning.forecast import forecast, machine
from winnow.planning.load import GB, Work
from winnow.planning.plan import Plan

EVALUATED = 64  # windows of evaluation at most
SHORTEST = 32  # tokens of a window, of a short text


def init(
    model: str,
    revision: str | None,
    texts: Sequence[str],
    eval_texts: Sequence[str],
    keeps: Sequence[float],
    methods: Sequence[str],
    output: Path,
) -> list[str]:
    """Write a configuration with comments; returns lines that say what is in it and how it is run. Raises InputError, and writes
    nothing, if the file exists, or for a model, a text or an option that a run would refuse."""
    if output.exists():
        raise InputError(f"{output}: exists already; remove it, or write another file with --output")
    if eval_texts and not texts:
        raise InputError("--eval-text: is given without --text; give the text of calibration too")
    root, suggested = checkout(), of_model(model, revision)
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_.-]", "", Path(model).resolve().name if revision is None else model.split("/")[-1])
    calibration, evaluation = texts_of(texts, eval_texts, root)
    length, windows, evaluated = _sizes(suggested, model, calibration, evaluation)
    budgets = [f"all-{keep:g}" for keep in keeps]
    source: dict[str, Any] = {"source": model, **({"revision": revision} if revision else {}), "dtype": suggested.dtype}
    content: dict[str, Any] = {
        "models": {name[:LONGEST] or "model": source},
        "texts": {"calibration": calibration, "evaluation": evaluation},
        "calibrations": {"mine": {"text": "calibration", "windows": windows, "length": length, **precision_of(suggested)}},
        "budgets": {b: {"targets": list(TARGETS)[:2], "keep_bytes": keep} for b, keep in zip(budgets, keeps, strict=True)},
        "evaluations": {"mine": {"text": "evaluation", "protocol": "p1", "length": length, "windows": evaluated}},
    }
    grid = {"models": [*content["models"]], "calibrations": ["mine"], "methods": list(methods), "budgets": budgets}
    content["experiments"] = {"mine": {**grid, "evaluations": ["mine"]}}
    largest = _largest(content, suggested, root)
    memory = machine()["memory"]
    if largest and largest.memory > memory:
        source["load"] = "stream"
        largest = _largest(content, suggested, root)
    with atomic(output) as partial:
        partial.write_text(_commented(content, suggested, bool(texts)), encoding="utf-8")
    return _said(content, suggested, output, root, bool(texts), largest)


def _sizes(suggested: Suggested, model: str, calibration: dict[str, Any], evaluation: dict[str, Any]) -> tuple[int, int, int]:
    """(tokens of a window, calibration windows, evaluation windows), fewer where the texts have fewer tokens. Raises InputError
    for texts without enough for the shortest windows."""
    length, windows = suggested.length, windows_of(suggested)
    if suggested.shape is None:
        return length, windows, EVALUATED
    have, scored = tokens_of(calibration, model), tokens_of(evaluation, model)
    while length > SHORTEST and (have < FEWEST * length or scored < 2 * length):
        length //= 2
    windows = max(FEWEST, -(-windows * suggested.length // length))
    found = min(windows, have // length), min(EVALUATED, scored // length)
    if found[0] < 1 or found[1] < 2:
        raise InputError(f"the texts have about {have:,} and {scored:,} tokens, too few for windows of {length}; use longer ones")
    return length, *found


def _largest(content: dict[str, Any], suggested: Suggested, root: Path) -> Work | None:
    """The job that needs most memory; the configuration is checked on the way."""
    plan = Plan(load(content), root)
    shapes = {name: suggested.shape for name in content["models"] if suggested.shape}
    return max(forecast(plan, shapes), key=lambda work: work.memory, default=None)


def _commented(content: dict[str, Any], suggested: Suggested, own_texts: bool) -> str:
    """The file: every section with what one may want to change in it."""
    comments = {
        "models": f"what is compressed: {_model(suggested)}. `load: stream` reads it block by block, for less memory",
        "texts": ("rows for statistics and rows that are scored, which must not overlap" if own_texts else DEMO),
        "calibrations": "windows on which statistics are collected; papers use 128 or 256 of 2,048 tokens. More take longer",
        "budgets": "stored over dense bytes of the chosen matrices; add others, each by a name of your choice",
        "evaluations": "loss and perplexity; without `windows`, on the whole text",
        "experiments": "products of the names above. Presets are known by name, `winnow_factored` (no rounding) or `whitened` "
        "(SVD-LLM) for example; winnow's config/README.md has all of them, and every key",
    }
    lines = ["# Written by `winnow init`; edit it as you like."]
    for section, preset in content.items():
        lines += ["", *textwrap.wrap(comments[section], 118, initial_indent="# ", subsequent_indent="# ")]
        lines.append(dumped({section: preset}).rstrip())
    return "\n".join(lines) + "\n"


DEMO = "the demo's texts, for a first look: use text like that of your application, and score other text"


def _model(suggested: Suggested) -> str:
    shape = suggested.shape
    if shape is None:
        return suggested.architecture
    numbers = f"{shape.numbers / 1e6:,.1f} million numbers, {shape.bytes / 1e6:,.1f} MB"
    return f"{suggested.architecture}, {shape.layers} layers, {numbers}"


def _said(
    content: dict[str, Any], suggested: Suggested, output: Path, root: Path, own_texts: bool, largest: Work | None
) -> list[str]:
    calibration, memory = content["calibrations"]["mine"], machine()["memory"]
    line = f"{output}: {_model(suggested)}; {calibration['windows']} calibration windows of {calibration['length']} tokens"
    found = [line + ("" if own_texts else " of the demo's texts (--text gives your own)")]
    if largest:
        need = f"{largest.memory / GB:.1f} GB for {largest.stage}, there are {memory / GB:.1f} GB"
        found.append(f"Memory: {need}{' (streamed)' if 'load' in next(iter(content['models'].values())) else ''}")
    where = "" if Path.cwd() == root else f" --snakefile {root / 'Snakefile'}"
    run = f"snakemake{{}}{where} --replace-workflow-config --configfile {output}"
    if suggested.shape is None:
        found.append(f"Download it:            {run.format(' prefetch')}")
    return [*found, f"What a run would take:  {run.format(' plan')}", f"Run it:                 {run.format('')}"]
