"""Tables of a results folder, printed."""

from __future__ import annotations

import csv
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.commands.plot import frontier
from winnow.errors import InputError
from winnow.reporting.formats import perplexity

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 8  # columns of a table of methods by budgets


def read_table(results: Path, name: str = "summary") -> list[dict[str, str]]:
    """The rows of a table; empty if there is no such table yet."""
    path = results / "tables" / f"{name}.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def markdown(results: Path) -> None:
    """Print the loss above dense of every method (rows) at every budget (columns), as a table for a README. With several
    calibration seeds, the mean and the error over seeds and windows; else the KL divergence beside it."""
    rows = read_table(results)
    columns, lines = pivot(several_seeds(results) or [row for row in rows if row["method"] != "dense"])
    print(f"| method | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    for method, *cells in lines:
        print(f"| {method} | {' | '.join(cells)} |")
    for line in of_dense(rows):
        print(f"\n{line}")


def pivot(rows: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """(names of columns, [method, cell of every column]): the loss above dense, and where there is one the KL divergence."""
    shown = ("model", "calibration", "recovery", "evaluation", "budget")
    varying = [name for name in shown if len({row[name] for row in rows}) > 1] or ["budget"]
    columns = list(dict.fromkeys(" ".join(row[name] for name in varying) for row in rows))
    found = {(row["method"], " ".join(row[name] for name in varying)): cell(row) for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    return columns, [[method, *(found.get((method, column), "-") for column in columns)] for method in methods]


def cell(row: dict[str, str]) -> str:
    """The loss above dense with its standard error, and in brackets the KL divergence from the dense model."""
    loss, error = float(row["delta_nll"]), float(row["delta_nll_se"])
    if not row.get("kl"):
        return with_error(loss, error)
    return f"{round(loss, 4) + 0.0:.4f} ± {error:.4f} ({float(row['kl']):.4f})"  # + 0.0: no -0.0000


def of_dense(rows: list[dict[str, str]]) -> list[str]:
    """One line for every dense model."""
    found = []
    for row in (r for r in rows if r["method"] == "dense"):
        model = f"Dense `{row['model']}`" + ("" if row["recovery"] == "none" else f" after the recovery `{row['recovery']}`")
        loss = f"{float(row['nll']):.4f} ± {float(row['nll_se']):.4f} nats per token"
        text = f"over {int(row['tokens']):,} tokens in {row['windows']} windows"
        found.append(f"{model}: {loss}, perplexity {perplexity(float(row['perplexity']))}, {text}.")
    return found


def with_error(value: float, error: float) -> str:
    """Format with three decimals, or up to six such that one digit of the error is shown."""
    decimals = next((n for n in range(3, 6) if error >= 0.5 * 10**-n), 6 if error else 3)
    return f"{round(value, decimals) + 0.0:.{decimals}f} ± {error:.{decimals}f}"  # + 0.0: no -0.0000


def several_seeds(results: Path) -> list[dict[str, str]]:
    """The rows of the spread table, if any row has several calibration seeds."""
    rows = read_table(results, "spread")
    return rows if any(int(row["seeds"]) > 1 for row in rows) else []


def show_spread(results: Path, rows: list[dict[str, str]]) -> None:
    """Print means over seeds, the best method of every budget first, and which others are tied with it."""
    from rich.console import Console
    from rich.table import Table

    from winnow.evaluation.spread import standing

    table = Table(title=str(results / "tables" / "spread.csv"), title_justify="left")
    names = ("model", "calibration", "evaluation", "recovery", "budget", "method")
    for column in (*names, "seeds", "nats above dense", "over seeds only", "above the best"):
        table.add_column(column, justify="left" if column in names else "right", no_wrap=True)
    for _, cells in groupby(sorted(rows, key=lambda row: [row[name] for name in names[:-1]]), key=itemgetter(*names[:-1])):
        ordered = sorted(cells, key=lambda row: float(row["above_best"]))
        best = next(row for row in ordered if row["method"] == row["best"])
        for row, above in zip(ordered, standing(ordered, best), strict=True):
            loss = f"{float(row['delta_nll']):.4f} ± {float(row['delta_nll_se']):.4f}"
            of_seeds = f"± {float(row['delta_nll_seed_se']):.4f}" if row["delta_nll_seed_se"] else "-"
            table.add_row(*(row[name] for name in names), row["seeds"], loss, of_seeds, above)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def show(results: Path, every: bool = False, plot: bool | None = None) -> None:
    """Print the losses of every method at every budget, their frontier as a plot (by default in a terminal), and where figures
    and report are; nothing if there is no summary yet. `every`: a row per cell, with bytes and perplexity."""
    from rich.console import Console
    from rich.table import Table

    rows = read_table(results)
    if not rows:
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    compressed = [row for row in rows if row["method"] != "dense"]
    columns, lines = pivot(compressed)
    title = f"{results / 'tables' / 'summary.csv'}: nats per token above dense ± standard error"
    if every or len(columns) > WIDEST:
        console.print(_table_of(rows, str(results / "tables" / "summary.csv")))
    else:
        kl = " (KL to dense)" if any(row["kl"] for row in compressed) else ""
        table = Table(title=f"{title}{kl}", title_justify="left")
        table.add_column("method", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
        for parts in lines:
            table.add_row(*(part.replace(" (", "\n(") for part in parts))
        console.print(table)
        for line in of_dense(rows):
            console.print(line, highlight=False)
    if means := several_seeds(results):
        show_spread(results, means)
    if sys.stdout.isatty() if plot is None else plot:
        for line in frontier(compressed, min(console.width, 120)):
            print(line)
    for name, path in (("Frontier", "figures/frontier.png"), ("Report", "report.html")):
        if (results / path).is_file():
            console.print(f"{name}: {results / path}", soft_wrap=True)


def _table_of(rows: list[dict[str, str]], title: str) -> Table:
    """A row per cell."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    names = ["model", "calibration", "evaluation", "method", "budget"]
    if any(row["recovery"] != "none" for row in rows):
        names.append("recovery")
    for column in (*names, "kept", "stored bytes", "nats above dense", "perplexity", "KL"):
        table.add_column(column, justify="left" if column in names else "right", no_wrap=True)
    for row in rows:
        above = f"{float(row['delta_nll']):.4f} ± {float(row['delta_nll_se']):.4f}"
        numbers = (
            f"{float(row['keep_bytes']):.4f}",
            f"{int(row['stored_bytes']):,}",
            above,
            perplexity(float(row["perplexity"])),
        )
        table.add_row(*(row[name] for name in names), *numbers, f"{float(row['kl'] or 'nan'):.4f}")
    return table


def latency(results: Path) -> None:
    """Print the latency table, one line per row. Raises InputError if there is none."""
    from winnow.evaluation.latency_table import lines

    path = results / "tables" / "latency.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such table; run `snakemake latency` with an experiment that measures latency")
    print("\n".join(lines(path)))
