"""`python -m winnow`: commands outside of a workflow run."""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.errors import InputError, absent, missing

if TYPE_CHECKING:
    from winnow.planning.plan import Plan

DEFAULT = Path("config/config.yaml")  # in the checkout


def read_table(results: Path, name: str = "summary") -> list[dict[str, str]]:
    """The rows of a table; empty if there is no such table yet."""
    path = results / "tables" / f"{name}.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def markdown(results: Path) -> None:
    """Print the loss above dense of every method (rows) at every budget (columns), as a table for a README. With several
    calibration seeds, the mean and the error over seeds and windows."""
    rows = read_table(results)
    compressed = several_seeds(results) or [row for row in rows if row["method"] != "dense"]
    shown = ("model", "calibration", "recovery", "evaluation", "budget")
    varying = [name for name in shown if len({row[name] for row in compressed}) > 1] or ["budget"]
    columns = list(dict.fromkeys(" ".join(row[name] for name in varying) for row in compressed))
    losses = {
        (
            row["method"],
            " ".join(row[name] for name in varying),
        ): with_error(float(row["delta_nll"]), float(row["delta_nll_se"]))
        for row in compressed
    }
    print(f"| method | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    for method in dict.fromkeys(row["method"] for row in compressed):
        print(f"| {method} | {' | '.join(losses.get((method, column), '-') for column in columns)} |")
    for row in (r for r in rows if r["method"] == "dense"):
        model = f"Dense `{row['model']}`" + ("" if row["recovery"] == "none" else f" after the recovery `{row['recovery']}`")
        print(f"\n{model}: {float(row['nll']):.4f} ± {float(row['nll_se']):.4f} nats per token, perplexity", end=" ")
        print(f"{float(row['perplexity']):.2f}, over {int(row['tokens']):,} tokens in {row['windows']} windows.")


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


def show(results: Path) -> None:
    """Print the summary table and the report's path; nothing if there is no summary yet."""
    from rich.console import Console
    from rich.table import Table

    rows = read_table(results)
    if not rows:
        return
    path = results / "tables" / "summary.csv"
    table = Table(title=str(path), title_justify="left")
    names = ["model", "calibration", "evaluation", "method", "budget"]
    if any(row["recovery"] != "none" for row in rows):
        names.append("recovery")
    for column in (*names, "kept", "stored bytes", "nats above dense", "perplexity", "KL"):
        table.add_column(column, justify="left" if column in names else "right", no_wrap=True)
    for row in rows:
        above = f"{float(row['delta_nll']):.4f} ± {float(row['delta_nll_se']):.4f}"
        numbers = (f"{float(row['keep_bytes']):.4f}", f"{int(row['stored_bytes']):,}", above, f"{float(row['perplexity']):.2f}")
        table.add_row(*(row[name] for name in names), *numbers, f"{float(row['kl'] or 'nan'):.4f}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if means := several_seeds(results):
        show_spread(results, means)
    report = results / "report.html"
    if report.is_file():
        console.print(f"Report: {report}", soft_wrap=True)


def latency(results: Path) -> None:
    """Print the latency table, one line per row. Raises InputError if there is none."""
    from winnow.evaluation.latency_table import lines

    path = results / "tables" / "latency.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such table; run `snakemake latency` with an experiment that measures latency")
    print("\n".join(lines(path)))


def checkout() -> Path:
    """The folder of the workflow, its code and its default configuration: the current one, or that of an --editable installation.
    Raises InputError if neither is a checkout."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / DEFAULT).is_file() and (folder / "src" / "winnow").is_dir():
            return folder
    raise InputError(f"{Path.cwd()}: not a checkout of winnow, whose code and configuration are compared; run it in one")


def plan_of(files: list[Path], replace: bool) -> Plan:
    """The plan of a configuration as Snakemake merges it: the default file, then `files`, key by key."""
    from winnow.planning.config import load
    from winnow.planning.config_sources import anchored, merged, sources
    from winnow.planning.plan import Plan

    root = checkout()
    parts = sources([] if replace else [root / DEFAULT], files)
    return Plan(load(anchored(merged(parts), parts, root), parts), root)


def hand_on(command: str, checkpoint: Path, directory: Path, dtype: str) -> None:
    """Write `directory` from a checkpoint, as a dense model in `dtype` (`export`) or unchanged (`share`), with its results."""
    from winnow.checkpoint.export import export_dense
    from winnow.checkpoint.share import measured_beside, share
    from winnow.io.artifacts import atomic

    if directory.exists():
        raise InputError(f"{directory}: exists already; use a new directory")
    measured = measured_beside(checkpoint)
    said = "loads with winnow"
    with atomic(directory) as folder:
        if command == "export":
            made = export_dense(checkpoint, folder, None, measured, dtype)
            rounded = f"in {made.dtype} with a relative rounding error of {made.error:.1e}"
            said = f"{made.bytes:,} bytes, {rounded}; dense, does not need winnow"
        else:
            share(checkpoint, folder, measured)
    numbers = f"{len(measured)} evaluations in its card" if measured else "no results in its card, as there are no evaluations"
    print(f"{directory}: {said}; {numbers}")


def lm_eval(options: list[str]) -> None:
    """Run the command line of lm-eval in this process, in which transformers can load compressed checkpoints."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *options]
    cli_evaluate()


def main() -> None:
    parser = argparse.ArgumentParser(prog="winnow", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="print the summary table of a results folder")
    command.add_argument("results", type=Path)
    command.add_argument("--markdown", action="store_true", help="a table of losses for a README")
    command.add_argument("--latency", action="store_true", help="the latency table, one line per row")
    command = commands.add_parser("explain", help="print what an artefact was made from, and what has changed since")
    command.add_argument("artefact", type=Path)
    command.add_argument("--configfile", type=Path, nargs="*", default=[], help="as given to snakemake")
    command.add_argument("--replace-workflow-config", action="store_true", help="as given to snakemake")
    command = commands.add_parser("export", help="export a checkpoint as a dense model that does not need winnow")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("directory", type=Path, help="a new directory")
    dtypes = ("original", "float32", "bfloat16", "float16")
    command.add_argument(
        "--dtype", choices=dtypes, default="original", help="dtype of its tensors (default: as in the original model)"
    )
    command = commands.add_parser("share", help="copy a checkpoint with its measured results in the card")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("directory", type=Path, help="a new directory")
    commands.add_parser(
        "lm-eval", help="the command line of lm-eval; --model hf also loads compressed checkpoints", add_help=False
    )
    command = commands.add_parser("config", help="write or check the files generated from the typed configuration")
    command.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    arguments, options = parser.parse_known_args()
    if options and arguments.command != "lm-eval":
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    try:
        if arguments.command == "lm-eval":
            lm_eval(sys.argv[2:])
        elif arguments.command == "show":
            (markdown if arguments.markdown else latency if arguments.latency else show)(arguments.results)
        elif arguments.command == "explain":
            from winnow.planning.explain import explain

            for line in explain(arguments.artefact, plan_of(arguments.configfile, arguments.replace_workflow_config)):
                print(line)
        elif arguments.command in ("export", "share"):
            hand_on(arguments.command, arguments.checkpoint, arguments.directory, getattr(arguments, "dtype", "original"))
        else:
            from winnow.planning.config_files import generate

            generate(Path.cwd(), check=arguments.check)
    except InputError as error:
        sys.exit(f"winnow: {error}")
    except ModuleNotFoundError as error:
        if library := missing(error):
            sys.exit(f"winnow: {arguments.command}: {absent(library)}")
        raise


if __name__ == "__main__":
    main()
