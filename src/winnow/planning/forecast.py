"""Peak memory, disk and time of every stage, from the configuration and the shapes of the models alone.

Bounds, not promises: memory and disk are sums of the tensors that a stage holds or writes; time is arithmetic and bytes
written over a rate each, or the median of earlier runs of the same stage on the same model where there are any.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.calibration.few_tokens import too_few
from winnow.errors import InputError
from winnow.evaluation.kinds.accuracy import Accuracy
from winnow.evaluation.kinds.classification import Classification
from winnow.evaluation.kinds.latency import Latency
from winnow.evaluation.kinds.perplexity import Perplexity
from winnow.io.artifacts import read_json
from winnow.io.tensors import read_header
from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix, matrices_of, select
from winnow.models.config_json import check_source
from winnow.models.files import BYTES, model_files, tensor_bytes
from winnow.planning.config import Budget
from winnow.planning.grid import Cell
from winnow.planning.plan import Plan
from winnow.recovery.base import Trained
from winnow.recovery.kinds.finetune import Finetune
from winnow.recovery.kinds.sequential import Sequential
from winnow.structures.base import EIGEN
from winnow.training.options import Tuning

MB, GB = 1e6, 1e9
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
STREAMING = ("collect_statistics", "evaluate_dense", "evaluate_perplexity", "evaluate_perplexity_healed")
BASE = 450 * MB  # of a process that imported what it needs, measured on the demo
# Of one that collects statistics block by block, that scores a model so, and of `compress`; measured.
COLLECTING, EVALUATING, COMPRESSING = 485 * MB, 425 * MB, 355 * MB
SIZE = 190  # bytes of a size of a fit (what it stores, what it loses), of all matrices at once, in all copies; measured
TABLE, ROW = 50 * MB, 600  # bytes of the table of channels: of the library that writes it, and of a row in all its copies
START = 5.0  # seconds until such a process computes
WRITTEN = 0.15 * GB  # bytes a second of what a job writes, with reading, checking and cutting what that is made of; of `compress`
ROWS = 10_000  # of a task, where its files do not tell
CHECKED, PRODUCT, STREAMED = 1 << 22, 1 << 22, 1 << 21  # numbers at a time: of weights, of sums of statistics, of logits by block
LOGITS = 1 << 24  # numbers that the loss holds in float64 at a time, several copies


@dataclass(frozen=True)
class Shape:
    """What a forecast needs of a model: its matrices, all numbers and bytes, vocabulary, width and depth."""

    matrices: list[Matrix]
    numbers: int
    bytes: int
    unit: int  # bytes of a stored number of a matrix
    vocabulary: int
    width: int
    layers: int

    def sites(self) -> dict[tuple[int, str], int]:
        """{distinct input: its width}"""
        return {(m.layer, m.site): m.shape[1] for m in self.matrices}

    def block(self) -> int:
        """Numbers of the largest layer's matrices."""
        layers: dict[int, int] = {}
        for m in self.matrices:
            layers[m.layer] = layers.get(m.layer, 0) + math.prod(m.shape)
        return max(layers.values())

    def layer_sums(self, unit: int) -> float:
        """Bytes of the sums of one layer's statistics in float64, and of the products that are being added."""
        layers: dict[int, int] = {}
        for (layer, site), width in self.sites().items():
            numbers = width**2 + (width * self.width if site.endswith("ffn_hidden") else 0)
            layers[layer] = layers.get(layer, 0) + numbers
        return 8 * max(layers.values()) + (8 + unit) * min(PRODUCT, max(width**2 for width in self.sites().values()))

    def dense_bytes(self, targets: list[str]) -> int:
        return sum(m.shape[0] * m.shape[1] for m in select(self.matrices, targets)) * self.unit


@dataclass(frozen=True)
class Work:
    """One stage of one model: how many jobs, and the largest of each kind of need among them; disk is of all of them."""

    stage: str
    model: str
    jobs: int
    memory: float  # bytes, of the largest job
    disk: float  # bytes, of all jobs
    operations: float  # floating point, of all jobs

    def seconds(self, rate: float) -> float:
        return self.jobs * START + self.operations / rate + self.disk / WRITTEN


def shape_of(source: Path, manifest: Path | None = None) -> Shape:
    """The shape of a model directory, from its config and the headers of its weight files (or from a manifest of
    `retrieve_model`). Raises InputError for a directory that holds no usable weights or an unknown family, and for a config.json
    that is refused."""
    if manifest is not None and manifest.is_file():
        found = read_json(manifest)
        source, tensors, family = Path(found["directory"]), found["tensors"], found["model_type"]
    else:
        files, tensors = model_files(source), {}
        check_source(source)
        for path in (p for p in files if p.suffix == ".safetensors"):
            tensors |= read_header(path)
        family = json.loads((source / "config.json").read_text(encoding="utf-8"))["model_type"]
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    matrices = matrices_of(family, tensors)
    if not matrices:  # files of some families leave the name of the base model out
        matrices = matrices_of(family, {f"{base}.{name}": t for name, t in tensors.items() for base in ("transformer", "model")})
    if not matrices:
        raise InputError(f"{source}: no layer of a {family} model is in its weight files")
    record = next(t for name, t in tensors.items() if name.endswith(f"{matrices[0].module.partition('.')[2]}.weight"))
    return Shape(
        matrices,
        sum(math.prod(t["shape"]) for t in tensors.values()),
        sum(tensor_bytes(t) for t in tensors.values()),
        BYTES[record["dtype"]],
        int(config.get("vocab_size", 0)),
        next(m.shape[1] for m in matrices if m.site == "ffn_input"),
        len({m.layer for m in matrices}),
    )


def forecast(plan: Plan, shapes: dict[str, Shape], batch_tokens: int = 4096) -> list[Work]:
    """The work of every stage of every model (by preset name) that has a shape, whether it is cached or not."""
    found = []
    for name, shape in shapes.items():
        cells = [cell for cell in plan.cells if cell.model == name]
        found += _of_model(plan, name, shape, cells, batch_tokens)
    return found


def _of_model(plan: Plan, name: str, shape: Shape, cells: list[Cell], batch_tokens: int) -> list[Work]:
    dtype = WIDTHS[plan.config.models[name].dtype]
    loaded = shape.numbers * dtype
    compressed = [cell for cell in cells if cell.method]
    calibrations = dict.fromkeys(cell.calibration for cell in compressed if cell.calibration)
    fits = [(c.calibration, member) for c in compressed if c.calibration and c.method for member in plan.members[c.method]]
    methods = dict.fromkeys(fits)
    checkpoints = dict.fromkeys(
        (c.calibration, c.method, c.budget) for c in compressed if c.calibration and c.method and c.budget
    )
    widest = max(max(m.shape) for m in shape.matrices)
    largest = max(shape.matrices, key=lambda m: m.shape[0] * m.shape[1])
    gram = sum(width**2 for width in shape.sites().values())
    cross = sum(w * shape.width for (_, site), w in shape.sites().items() if site == "ffn_hidden")
    gradient = sum(m.shape[0] ** 2 for m in shape.matrices)
    per_token = (8 * shape.width + 4 * widest) * dtype
    activations = batch_tokens * per_token
    embeddings = shape.vocabulary * shape.width
    streamed = plan.config.models[name].load == "stream"
    read = shape.unit * max(embeddings, math.prod(largest.shape))
    works = [Work("retrieve_model", name, 1, BASE + read + 4 * CHECKED, 1e5, 0)]

    def add(stage: str, jobs: int, memory: float, disk: float, operations: float, base: float = BASE) -> None:
        if jobs:
            works.append(Work(stage, name, jobs, base + memory, disk, operations))

    reading = [(c, m) for c, m, b in checkpoints if b and plan.allocation(plan.labels["budgets"][b]).predicts()]
    predicted = {(c, member) for c, method in reading for member in plan.members[method]}
    gradients = {c for c, m in methods if "gradients" in plan.needs(plan.labels["methods"][m])} | {c for c, _ in predicted}
    recovering = ((c.calibration, r) for c in cells if c.method and c.recovery for r in plan.config.steps(c.recovery))
    gradients |= {str(c) for c, recovery in recovering if plan.config.recoveries[recovery].reads_gradients}
    for calibration in calibrations:
        preset = plan.config.calibrations[calibration]
        tokens, unit = preset.windows * preset.length, 8 if preset.precision == "float64" else 4
        add("tokenize", 1, 0, tokens * 4, 0)  # and one per evaluation, below
        memory: float = loaded + 8 * (gram + cross) + activations
        disk: float = unit * (gram + cross)
        passed = 2 * tokens * shape.numbers
        if streamed:
            batch = min(preset.windows, max(1, batch_tokens // preset.length)) * preset.length
            memory = dtype * (shape.block() + embeddings) + shape.layer_sums(unit) + batch * per_token
            memory = max(memory, TABLE + ROW * sum(shape.sites().values())) + COLLECTING - BASE
            disk += 2 * tokens * shape.width * dtype
        add("collect_statistics", 1, memory, disk, passed + 2 * tokens * (gram + cross))
        if calibration in gradients:
            held = activations * shape.layers + 3 * batch_tokens * shape.vocabulary * 8
            add("collect_gradients", 1, loaded + 8 * gradient + held, unit * gradient, 3 * passed + 2 * tokens * gradient)
    groups_of: dict[str, int] = {}  # {method: numbers of its largest group}
    sizes_of: dict[str, int] = {}  # {method: sizes of all groups, up to break-even}
    fitted, clusterings = sum(m.shape[0] * m.shape[1] for m in shape.matrices), set()
    for of, method in methods:
        label = plan.labels["methods"][method]
        structure, metric = plan.structure(label), plan.preset("methods", label).metric
        group = structure.groups(shape.matrices)
        sides = [(sum(m.shape[0] for m in g), max(m.shape[1] for m in g)) for g in group]
        groups_of[method] = max(m * n for m, n in sides)
        sizes_of[method] = sum(m * n // (m + n) for m, n in sides)
        needs = METRICS[metric.kind].needs if metric else ()
        works_of = [structure.work(g, needs) for g in group]
        sums = (sum(own[part] for own in works_of) for part in (2, 1))
        add("factorize", plan.config.models[name].shards, max(own[0] for own in works_of), *sums)
        add("measure_spectra", 1, 4 * max(m * n for m, n in sides), 1e6, 0)
        if cluster := plan.clustering_label(label):
            clusterings.add((of, cluster))
        if (of, method) in predicted:
            held = 8 * max(2 * m * n + 2 * (m * m + n * n) for m, n in sides)
            tokens = plan.config.calibrations[of].windows * plan.config.calibrations[of].length
            few = [n + shape.width for _, n in sides if too_few(n, tokens)]  # of an FFN, its input and its hidden units together
            predicting = 1.0 * sum(4 * m * n * (m + n) for m, n in sides) + EIGEN * sum(n**3 for n in few)
            add("predict_losses", 1, held + 8 * 5 * max(few, default=0) ** 2, 1e6, predicting)
    square = 8 * max(3 * m.shape[0] * m.shape[1] + 2 * m.shape[1] ** 2 for m in shape.matrices)
    add("assign_clusters", len(clusterings), square, 1e5, 0)
    for of, method, budget in checkpoints:
        b = plan.config.budgets[budget]
        dense = shape.dense_bytes(b.targets)
        kept = (b.keep_bytes or 1.0) * dense
        if again := plan.allocation(plan.labels["budgets"][budget]).rounds():
            preset = plan.config.calibrations[of]
            tokens, second = preset.windows * preset.length, gram + gradient
            held = activations * shape.layers + 3 * batch_tokens * shape.vocabulary * 8
            passes = again * (10 * tokens * shape.numbers + 2 * tokens * second)
            add("predict_in_rounds", 1, 2 * loaded + 8 * second + held, 1e6, passes)
        if plan.allocation(plan.labels["budgets"][budget]).learns:
            add("learn_sizes", 1, *_learning(plan, shape, name, of, b))
        largest_group = max(groups_of[member] for member in plan.members[method])
        table = SIZE * sum(sizes_of[member] for member in plan.members[method])
        add("compress", 1, max(read, 12 * largest_group) + table, shape.bytes - dense + kept, 0, COMPRESSING)
    recovered = dict.fromkeys(
        (c.calibration, c.method, c.budget, step)
        for c in cells
        if c.calibration and c.recovery
        for step in plan.config.steps(c.recovery)
    )
    exports = [of for made, of in plan.export_dtypes.items() if made.split("/")[1] == plan.labels["models"][name]]
    for of in exports:
        written = shape.numbers * WIDTHS[of] if of in WIDTHS else shape.bytes
        add("export_dense", 1, written + 3 * 8 * largest.shape[0] * largest.shape[1], written, 0)
    for given, of_method, of_budget, recovery in recovered:
        options = plan.config.recoveries[str(recovery)]
        if isinstance(options, Finetune.Options):
            add("recover" if of_method else "recover_dense", 1, *_tuning(plan, shape, options))
        if not isinstance(options, Trained | Sequential.Options):
            continue
        steps = options.steps if isinstance(options, Trained) else 0
        share = plan.config.budgets[of_budget].keep_bytes or 1.0 if of_budget else 1.0
        windows = plan.config.calibrations[str(given)]
        states = 2 * windows.windows * windows.length * shape.width  # what a block gets and gives
        step = options.batch * windows.length
        held = step * (3 * shape.vocabulary + 12 * shape.width * shape.layers + 4 * widest)
        passes = 8 * steps * step + 4 * windows.windows * windows.length * shape.layers
        memory = 4 * (2 * shape.numbers + 6 * share * fitted + states + held)
        add("recover" if of_method else "recover_dense", 1, memory, share * shape.bytes, passes * shape.numbers)
    if tuning := plan.config.models[name].finetune:
        add("finetune", 1, *_tuning(plan, shape, tuning))
    for cell in cells:
        evaluation = plan.config.evaluations[cell.evaluation]
        suffix = "" if cell.method else "_healed" if cell.recovery else "_dense"
        if isinstance(evaluation, Accuracy.Options):
            scores = batch_tokens * shape.vocabulary
            add(f"evaluate_accuracy{suffix}", 1, loaded + activations + 3 * 4 * scores, 1e5, 0)
        if isinstance(evaluation, Latency.Options):
            held = max(evaluation.batches) * max(evaluation.prompts) * (8 * shape.width + 4 * widest + 4 * shape.vocabulary)
            add("evaluate_latency" if cell.method else "evaluate_latency_dense", 1, 2 * loaded + held * dtype, 1e5, 0)
        if isinstance(evaluation, Classification.Options):
            rows = min(evaluation.limit or ROWS, rows_of(evaluation.test))
            scored = 2 * rows * evaluation.length * shape.numbers
            add(f"evaluate_classification{suffix}", 1, loaded + activations, 1e5, scored)
        if not isinstance(evaluation, Perplexity.Options):
            continue
        if not cell.method and not cell.recovery:
            add("tokenize", 1, 0, 1e6, 0)
        models = 2 if cell.recovery and evaluation.compare else 1
        rows = max(evaluation.length, batch_tokens) * shape.vocabulary
        memory = models * (loaded + rows * dtype) + 4 * 8 * min(LOGITS, rows) + activations
        count, disk, base = evaluation.windows or 100, 1e5, BASE
        scored = count * evaluation.length
        if streamed:
            batch = min(count, max(1, batch_tokens // evaluation.length)) * evaluation.length
            passing = dtype * (shape.block() + embeddings) + batch * per_token
            memory = max(passing, models * (dtype * embeddings + 4 * 8 * STREAMED))
            disk, base = disk + 2 * models * scored * shape.width * dtype, EVALUATING
        stage = "evaluate_perplexity" if cell.method else "evaluate_perplexity_healed" if cell.recovery else "evaluate_dense"
        add(stage, 1, memory, disk, 2 * models * scored * shape.numbers, base)
    return _merged(works)


def _learning(plan: Plan, shape: Shape, model: str, calibration: str, budget: Budget) -> tuple[float, float, float]:
    """(memory, disk, operations) of learning sizes: the dense model with factors of as many numbers beside its chosen matrices,
    and what a step back needs of its tokens: of every layer, of every mask, and of the logits. A step is a pass of the dense
    model, and one there and back of both; a look at the held-out windows is a pass of each."""
    options: Any = budget.allocation
    windows, chosen = plan.config.calibrations[calibration], select(shape.matrices, budget.targets)
    unit = 4 if plan.config.models[model].dtype == "float32" else 2
    factors = sum(math.prod(m.shape) for m in chosen)
    step = options.batch * windows.length
    masked = sum(2 * min(m.shape) + 3 * m.shape[0] for m in chosen)
    held = step * (5 * 4 * shape.vocabulary + unit * (12 * shape.width * shape.layers + masked))
    looks = (1 + options.steps / options.every) * options.held_out * windows.windows * windows.length
    passes = options.steps * step * (6 * shape.numbers + 4 * factors) + looks * 4 * shape.numbers
    return unit * (shape.numbers + factors) + held, 1e5, passes


def _tuning(plan: Plan, shape: Shape, tuning: Tuning) -> tuple[float, float, float]:
    """(memory, disk, operations) of training all weights in float32 on a task's train rows: weights, gradients, two moments."""
    task = plan.task(tuning.task)
    tokens = tuning.batch * task.length
    held = 4 * tokens * shape.layers * (14 * shape.width + 3 * max(max(m.shape) for m in shape.matrices))
    steps = tuning.total_steps(rows_of(task.train))
    return 16 * shape.numbers + held, 4 * shape.numbers, 6.0 * steps * tokens * shape.numbers


def rows_of(files: list[str]) -> int:
    """Rows of a task's local files as far as lines tell them; ROWS for files of other kinds, and for a data set of the hub."""
    lines = [p for p in map(Path, files) if p.suffix in (".jsonl", ".csv", ".json") and p.is_file()]
    return sum(p.read_bytes().count(b"\n") for p in lines) or ROWS


def _merged(works: list[Work]) -> list[Work]:
    """One row per stage and model, in the order of the stages."""
    rows: dict[tuple[str, str], Work] = {}
    for w in works:
        key = (w.stage, w.model)
        o = rows.get(key)
        sums = (w.jobs, w.memory, w.disk, w.operations)
        if o is not None:
            sums = (o.jobs + w.jobs, max(o.memory, w.memory), o.disk + w.disk, o.operations + w.operations)
        rows[key] = Work(w.stage, w.model, *sums)
    return list(rows.values())


def measured_seconds(results: Path, stage: str, label: str) -> float | None:
    """Median seconds of earlier jobs of a stage on a model (by label), from Snakemake's benchmark files."""
    folder = results / "benchmarks" / stage / label
    files = [*folder.rglob("*.tsv"), *folder.parent.glob(f"{label}.tsv")] if folder.parent.is_dir() else []
    seconds = []
    for path in files:
        with open(path, newline="", encoding="utf-8") as stream:
            seconds += [float(row["s"]) for row in csv.DictReader(stream, delimiter="\t")]
    return statistics.median(seconds) if seconds else None


def arithmetic_rate() -> float:
    """Floating-point operations per second of this machine, from a tenth of a second of float32 products; halved, since no
    stage is products only."""
    import numpy as np

    one = np.ones((512, 512), dtype=np.float32)
    one @ one
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        one @ one
        count += 1
    return 0.5 * count * 2 * 512**3 / (time.perf_counter() - began)


def machine() -> tuple[float, float]:
    """(bytes of memory, free bytes of disk) here; memory as the control group limits it, where it does."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, float(text))
    return memory, float(shutil.disk_usage(".").free)


def misfit(works: list[Work], to_run: dict[str, int], memory: float, disk: float) -> str | None:
    """One line if a stage that has jobs to run cannot fit into `memory`, or all of them into `disk`; else None."""
    waiting = [w for w in works if to_run.get(w.stage)]
    worst = max(waiting, key=lambda w: w.memory, default=None)
    if worst is not None and worst.memory > memory:
        streams = ", or see `load: stream`, which reads a model block by block" if worst.stage in STREAMING else ""
        return (
            f"{worst.stage} of {worst.model} needs about {worst.memory / GB:.1f} GB of memory, there are {memory / GB:.1f} GB; "
            f"run it where there is more (`--config memory_gb=...` says how much a job gets there){streams}"
        )
    need = sum(w.disk * min(1.0, to_run[w.stage] / w.jobs) for w in waiting)
    if need > disk:
        return (
            f"the results need about {need / GB:.1f} GB of disk, {disk / GB:.1f} GB are free; free some (`snakemake prune`), "
            "or use --directory (`--config disk_gb=...` says how much there is)"
        )
    return None
