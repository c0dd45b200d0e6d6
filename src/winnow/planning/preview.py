"""Preview of a run: cells, jobs, bytes, memory, disk and time, before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.models.shape import Shape
from winnow.numerics.operations import CALL
from winnow.planning.forecast import at_peak, measured_seconds
from winnow.planning.load import GB, MB, Work
from winnow.planning.plan import Plan
from winnow.planning.rates import Rates

if TYPE_CHECKING:
    from rich.table import Table


def jobs_of(dry_run: str) -> dict[str, int]:
    """{rule: jobs} from the output of `snakemake -n`; empty if there is nothing to do."""
    table = dry_run.partition("Job stats:")[2]
    rows = re.findall(r"^(\w+) +(\d+)$", table, flags=re.MULTILINE)
    return {rule: int(count) for rule, count in rows if rule != "total"}


def size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def cells_table(plan: Plan, shapes: dict[str, Shape]) -> Table:
    """One row per model and budget: the number of cells, and the requested bytes."""
    from rich.table import Table

    table = Table(title="Cells", title_justify="left")
    for column in ("model", "budget", "targets", "cells", "dense bytes", "requested", "stored bytes"):
        table.add_column(column, justify="left" if column in ("model", "budget", "targets") else "right")
    for model in dict.fromkeys(cell.model for cell in plan.cells):
        mine = [cell for cell in plan.cells if cell.model == model]
        shape = shapes.get(model)
        dense = sum(not cell.method for cell in mine)
        table.add_row(model, "dense", "all weights", str(dense), f"{shape.bytes:,}" if shape else "unknown", "1", "")
        budgets = [plan.budget_name(cell.budget) for cell in mine if cell.budget]
        for name in dict.fromkeys(budgets):
            budget = plan.config.budgets[name]
            total = shape.dense_bytes(budget.targets) if shape else None
            asked = next(
                f"{key} {value}" for key, value in budget.model_dump().items() if key in CURRENCIES and value is not None
            )
            stored = f"{total * budget.keep_bytes:,.0f}" if total and budget.keep_bytes else "by allocation"
            table.add_row(
                model,
                name,
                "+".join(budget.targets),
                str(budgets.count(name)),
                f"{total:,}" if total else "unknown",
                asked,
                stored,
            )
    return table


CURRENCIES = ("keep_bytes", "rank", "rank_fraction")


def works_table(
    works: Iterable[Work], plan: Plan, to_run: dict[str, int], results: Path, here: Rates, device: Rates | None = None
) -> tuple[Table, float]:
    """(one row per stage and model, total seconds of the jobs to run). With the rates of a `device`, jobs that use a GPU take
    their time there, and its memory and the host's have a column each."""
    from rich.table import Table

    table = Table(title="Stages", title_justify="left")
    memory = ("device\nmemory", "host\nmemory") if device else ("memory,\nlargest",)
    for column in ("stage", "model", "jobs", "to run,\nall models", *memory, "disk", "temporary", "seconds\na job", "from"):
        table.add_column(column, justify="left" if column in ("stage", "model", "from") else "right", no_wrap=True)
    total, elsewhere = 0.0, replace(here, written=device.written) if device else here
    for work in works:
        name = work.target.removeprefix("study_") or "*"
        there = device if work.host is not None else None
        measured = None if there else measured_seconds(results, work.stage, plan.labels["models"][work.model], name)
        rates = there or elsewhere
        each = work.seconds(rates) / work.jobs if measured is None else measured
        waiting = to_run.get(work.stage, 0)
        total += each * min(waiting, work.jobs)
        source = "arithmetic" if measured is None else "earlier jobs"
        held = [size(work.memory)]
        if device:
            held = ["", *held] if work.host is None else [*held, size(work.host)]
        numbers = (*held, size(work.disk), size(work.temporary) if work.temporary else "", f"{each:,.1f}", source)
        state = str(waiting) if waiting else "by its own target" if work.target else "cached"
        table.add_row(work.target or work.stage, work.model, str(work.jobs), state, *numbers)
    return table, total


def rates_line(here: Rates, device: Rates | None, name: str) -> str:
    """What seconds are computed from."""
    own = f"{here.products:.1e} operations a second (this machine)"
    if device is None:
        return f"seconds: {own}, {size(here.written)} written a second; `--config device=h200` is for a run elsewhere"
    kinds = {"16-bit products": device.half, "other products": device.products, "eigenproblems": device.decompositions}
    rates = ", ".join(f"{kind} {rate:.1e}" for kind, rate in kinds.items())
    calls = f"{1e6 * CALL / device.calls:.0f} microseconds a short call"
    line = f"seconds for one {name}: {rates} operations a second; {calls}; {size(device.written)} written a second"
    return f"{line}; jobs without a GPU: {own}"


def disk_lines(works: list[Work], shapes: dict[str, Shape]) -> list[str]:
    """For every model, what its intermediates and all of its results at peak come to, as multiples of its bytes."""
    found = []
    for name, shape in shapes.items():
        mine = [work for work in works if work.model == name]
        kept, peak = sum(work.disk for work in mine if work.intermediate), at_peak(mine)
        found.append(
            f"{name}: intermediates (statistics, gradients, factors, predictions) {size(kept)} of disk, "
            f"{kept / shape.bytes:.1f} times the model's bytes; with all results {size(peak)} at peak, "
            f"{peak / shape.bytes:.1f} times, if one job at a time has temporary files"
        )
    return found


def print_tables(tables: Iterable[Table]) -> None:
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140)
    for table in tables:
        console.print(table)
