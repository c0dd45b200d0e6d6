"""How the CPU seconds of every stage of the recommended preset grow with a model's width and depth, beside what is forecast.

    python -m tests.benchmarks.stages [--widths 128 256 512] [--depths 2 4 8] [--windows 16] [--length 128]

The workflow of `tests.benchmarks.streaming --recommended` is run on models of Llama's form with random weights, first of every
width with as many layers as the first depth, then of every depth with the first width; the FFN is three times as wide as the
model. Printed: CPU seconds of all jobs of a stage, without those that every process takes to start (the least that any job took),
their exponent from the first model to the last, and that of the operations that `snakemake plan` forecasts. Exits with 1 where a
stage that takes a second grows by an exponent that is more than 0.5 above its forecast.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.benchmarks.streaming import ROOT, configuration, recommended, run, write_model
from winnow.models.shape import shape_of
from winnow.planning.config import load
from winnow.planning.forecast import forecast
from winnow.planning.plan import Plan

MARGIN, LEAST, ALL = 0.5, 1.0, 1 << 40
VOCABULARY = 2000


def taken(folder: Path) -> dict[str, float]:
    """{rule: CPU seconds of all its jobs beyond the start of a process}"""
    lines = [line.split() for line in (folder / "peaks.txt").read_text().splitlines()]
    start, found = min(float(seconds) for _, _, seconds in lines), defaultdict[str, float](float)
    for stage, _, seconds in lines:
        found[stage] += float(seconds) - start
    return found


def measured(layers: int, width: int, windows: int, length: int) -> tuple[dict[str, float], dict[str, float]]:
    """({rule: CPU seconds}, {rule: forecast operations}) of the recommended preset on one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", layers, width, 3 * width, VOCABULARY, "float32")
        config = recommended(configuration(folder / "model", windows, length))
        status, output = run(folder, config, ALL, 1)
        if status:
            sys.exit(f"{output[-3000:]}\nthe workflow failed on {layers} layers of {width}")
        manifest = next((folder / "results").glob("large-*/model.json"))
        works = forecast(Plan(load(config), ROOT), {"large": shape_of(folder / "model", manifest)})
        return taken(folder), {work.stage: work.operations for work in works}


def show(what: str, sizes: list[int], found: list[tuple[dict[str, float], dict[str, float]]]) -> bool:
    """Print the table; whether nothing grows faster than forecast."""
    print(f"\n| CPU seconds; {what} | {' | '.join(map(str, sizes))} | exponent | forecast |\n|---|{'---:|' * (len(sizes) + 2)}")
    good, ratio = True, math.log(sizes[-1] / sizes[0])
    for stage in found[-1][0]:
        times, operations = ([one[kind].get(stage, 0.0) for one in found] for kind in (0, 1))
        if not operations[0] or times[-1] < LEAST:
            continue
        own, expected = (math.log(many / few) / ratio if few > 0 else math.nan for few, *_, many in (times, operations))
        good &= not own > expected + MARGIN or times[0] < LEAST / 10
        print(f"| {stage} | {' | '.join(f'{t:.1f}' for t in times)} | {own:.1f} | {expected:.1f} |", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    depth, width, windows = given.depths[0], given.widths[0], (given.windows, given.length)
    wide = [measured(depth, one, *windows) for one in given.widths]
    good = show("width", given.widths, wide)
    good &= show("layers", given.depths, [wide[0], *(measured(one, width, *windows) for one in given.depths[1:])])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
