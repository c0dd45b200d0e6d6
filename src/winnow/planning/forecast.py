"""Peak memory, disk and time of every stage, from the configuration and the shapes of the models alone.

Bounds, not promises: memory and disk are sums of the tensors that a stage holds or writes (`Stage.work` of every stage); time is
arithmetic and bytes written over a rate each, or the median of earlier runs of the same stage on the same model where there are
any.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.models.shape import Shape
from winnow.planning.load import GB, Load, Work
from winnow.planning.plan import Plan


def numbers_of(resources: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{rule: {resource: number}} of Snakemake's `--set-resources`, of those resources that forecasts depend on."""
    found = {}
    for rule, given in resources.items():
        numbers = {name: given[name] for name in ("batch_tokens", "stream", "hidden_mb") if name in given}
        found[rule] = {name: int(getattr(number, "value", number)) for name, number in numbers.items()}
    return found


def forecast(plan: Plan, shapes: dict[str, Shape], batch_tokens: int = 4096) -> list[Work]:
    """The work of every stage of every model (by preset name) that has a shape, whether it is cached or not."""
    found = []
    for name, shape in shapes.items():
        load = Load(plan, name, shape, [cell for cell in plan.cells if cell.model == name], batch_tokens)
        found += [work for stage in plan.stages.values() for work in stage.work(load.on(plan.resources.get(stage.name, {})))]
    return _merged(found)


def _merged(works: list[Work]) -> list[Work]:
    """One row per stage and model, in the order of the stages."""
    rows: dict[tuple[str, str, str], Work] = {}
    for w in works:
        key = (w.stage, w.model, w.target)
        o = rows.get(key)
        sums = (w.jobs, w.memory, w.disk, w.operations)
        if o is not None:
            sums = (o.jobs + w.jobs, max(o.memory, w.memory), o.disk + w.disk, o.operations + w.operations)
        rows[key] = Work(w.stage, w.model, *sums, w.streams, w.target)
    return list(rows.values())


def measured_seconds(results: Path, stage: str, label: str, name: str = "*") -> float | None:
    """Median seconds of earlier jobs of a stage (and a `name`) on a model (by label), from Snakemake's benchmark files."""
    folder = results / "benchmarks" / stage / label
    files = [*folder.rglob(f"{name}.tsv"), *folder.parent.glob(f"{label}.tsv")] if folder.parent.is_dir() else []
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
        streams = ", or see `load: stream`, which reads a model block by block" if worst.streams else ""
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
