"""Peak memory, disk and time of every stage, from the configuration and the shapes of the models alone.

Bounds, not promises: memory and disk are sums of the tensors that a stage holds or writes (`Stage.work` of every stage); time is
arithmetic and bytes written over a rate each (`winnow.planning.rates`), or the median of earlier runs of the same stage on the
same model where there are any.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping
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
        rows[key] = rows[key].with_more(w) if key in rows else w
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


def machine() -> dict[str, float]:
    """Bytes of `memory` and free bytes of `disk` here; memory as the control group limits it, where it does."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, float(text))
    return {"memory": memory, "disk": float(shutil.disk_usage(".").free)}


def at_peak(works: Iterable[Work], share: Callable[[Work], float] = lambda work: 1.0) -> float:
    """Bytes of disk when most are used: all results (a `share` of those of a stage), and the largest temporary files, of one job
    or of all jobs that share a calibration's windows. Jobs that run beside it add theirs."""
    rows = [(share(work) * work.disk, work.temporary) for work in works]
    return sum(disk for disk, _ in rows) + max((temporary for _, temporary in rows), default=0.0)


def misfit(works: list[Work], to_run: dict[str, int], memory: float, disk: float, device: float = 0.0) -> str | None:
    """One line if a stage that has jobs to run cannot fit into `memory`, or all of them into `disk`; else None. `device`: bytes
    of a GPU's memory, for jobs that use one; 0: they hold all in `memory`."""
    waiting = [w for w in works if to_run.get(w.stage)]
    needs = []
    for w in waiting:
        if device and w.host is not None:
            needs.append((w.memory, device, "memory on the device", "device_gb", w))
        needs.append((w.host if device and w.host is not None else w.memory, memory, "memory", "memory_gb", w))
    for need, limit, what, option, work in sorted(needs, key=lambda row: row[0] - row[1], reverse=True):
        if need > limit:
            streams = ", or see `load: stream`, which reads a model block by block" if work.streams else ""
            return (
                f"{work.stage} of {work.model} needs about {need / GB:.1f} GB of {what}, there are {limit / GB:.1f} GB; "
                f"run it where there is more (`--config {option}=...` says how much a job gets there){streams}"
            )
    need = at_peak(waiting, lambda w: min(1.0, to_run[w.stage] / w.jobs))
    if need > disk:
        return (
            f"the results need about {need / GB:.1f} GB of disk, {disk / GB:.1f} GB are free; free some (`snakemake prune`), "
            "or use --directory (`--config disk_gb=...` says how much there is)"
        )
    return None
