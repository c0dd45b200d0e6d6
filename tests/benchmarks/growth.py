"""How the time of a fit grows with the width: of neurons taken one by one, and of every structure; nothing may outgrow an
eigendecomposition.

    python -m tests.benchmarks.growth [--neurons 256 512 1024 2048] [--widths 128 256 512] [--threads 1]

First `by_gain` on random hidden units, d a third of f, beside the eigendecomposition of their Gram matrix. Then, of two random
layers with an FFN three times as wide as the model, what every structure takes to fit, to predict losses and to store half of
its largest size. Printed: seconds at every width, the exponent of the growth from the first to the last, and the one that is
expected. Exits with 1 where one is more than half above that. Neurons in d^2 f operations each had 3.6 from 256 to 1,024.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from tests.unit.worlds import FITTED, VARIANTS, World, small
from winnow.numerics.linalg import eigh
from winnow.numerics.neurons import by_gain
from winnow.structures.base import STRUCTURES

CUBIC, MARGIN = 3.0, 0.5


def seconds(run: Callable[[], object]) -> float:
    """Of the process, so that other work beside it counts little; the best of two runs."""
    found = []
    for _ in range(2):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)


def neurons(widths: list[int]) -> dict[str, list[float]]:
    """{step: seconds by number of neurons}"""
    found: dict[str, list[float]] = {"neurons by predicted loss": [], "neurons by output": [], "an eigendecomposition": []}
    for f in widths:
        generator = torch.Generator().manual_seed(f)
        hidden, weight, gradients = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2 * f, f), (f // 3, f), (f, f // 3))
        )
        gram, rows = hidden.T @ hidden / len(hidden), gradients.T @ gradients / f
        runs = (partial(by_gain, weight, gram, rows), partial(by_gain, weight, gram, None), partial(eigh, gram))
        for times, run in zip(found.values(), runs, strict=True):
            times.append(seconds(run))
    return found


def structures(widths: list[int]) -> dict[str, list[float]]:
    """{structure: seconds by width}"""
    found: dict[str, list[float]] = {}
    for width in widths:
        world = World("gram", width, 3 * width, 1, tokens=6 * width)
        for spec in [*map(small, FITTED), *VARIANTS]:
            found.setdefault(f"{spec}", []).append(seconds(partial(whole, world, spec)))
    return found


def whole(world: World, spec: dict) -> None:
    """Everything that a structure does with the groups of a world."""
    structure = STRUCTURES.build(spec)
    for group in structure.groups(world.matrices):
        problem = world.problem(structure, group)
        if structure.objective != "metric":
            problem = replace(problem, metric=None)
        fit = structure.fit(problem, structure.largest(group))
        if structure.predicts:
            sites = {m.name: world.moments(m.layer, m.site) for m in group}
            structure.predicted(replace(problem, sites=sites), fit.tensors)
        structure.stored(group, fit.tensors, max(1, (len(fit.error) - 1) // 2))


def show(what: str, widths: list[int], found: dict[str, list[float]]) -> bool:
    """Prints the table; whether nothing grows faster than expected."""
    heads = (*map(str, widths), "exponent", "expected")
    print(f"\n| {what} | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    good = True
    for name, times in found.items():
        exponent = math.log(times[-1] / times[0]) / math.log(widths[-1] / widths[0])
        good &= exponent <= CUBIC + MARGIN
        print(f"| {name} | {' | '.join(f'{t:.3f}' for t in times)} | {exponent:.2f} | {CUBIC:.0f} at most |", flush=True)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    good = show("seconds, of neurons", a.neurons, neurons(a.neurons))
    good &= show("seconds, of a structure; width", a.widths, structures(a.widths))
    sys.exit(0 if good else 1)
