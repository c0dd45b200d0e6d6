"""Seconds to round a matrix with feedback, beside one eigendecomposition of its larger side, which a factored fit takes.

    python tests/benchmarks/rounding.py [--shapes 512 1024 2048x8192] [--bits 3] [--threads 1] [--cpu-time] [--device cpu]

A random matrix (outputs x inputs) with inputs and gradients whose spectra are like i^-1, rounded in groups of 128: to nearest, in
the Gram metric (GPTQ), and on both sides (with the descent), for all `--bits` at once. Printed for every shape: seconds, what is
left of the error to nearest in the metric, the exponent of the width by which the seconds on both sides grew since the shape
before, and the peak memory of the process so far. All is float64.
"""

import argparse
import math
import resource
import time

import torch

from winnow.numerics.feedback import codes_of, grids_of, metric_for, objective
from winnow.numerics.grids import Form, scaled
from winnow.numerics.linalg import eigh

SWEEPS = 4  # as the structure has


def second_moment(width: int, device: str) -> torch.Tensor:
    """(width, width) with eigenvalues like i^-1 and channels of different energy."""
    vectors = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, device=device)).Q
    vectors = vectors * torch.rand(width, 1, dtype=torch.float64, device=device)
    return (vectors / torch.arange(1, width + 1, dtype=torch.float64, device=device)) @ vectors.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512", "1024", "2048"], help="a width, or OUTPUTSxINPUTS")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that others use; with one thread")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.cpu_time else time.perf_counter

    def timed(function, *arguments):
        began = clock()
        found = function(*arguments)
        if given.device != "cpu":
            torch.cuda.synchronize()
        return clock() - began, found

    print(
        "| shape | eigenproblem, s | nearest, s | Gram, s | both sides, s | Gram, error | both sides, error | exponent | GB |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    last = None
    for shape in given.shapes:
        m, n = (int(side) for side in (shape.split("x") * 2)[:2])
        torch.manual_seed(0)
        weight = torch.randn(m, n, dtype=torch.float64, device=given.device)
        columns, rows = second_moment(n, given.device), second_moment(m, given.device)
        forms = [Form(bits, "full", min(128, n)) for bits in given.bits]
        made = [scaled(weight, form, "unbiased", columns.diagonal()) for form in forms]
        grids = grids_of(forms, made, n)
        eigen, _ = timed(eigh, columns if n > m else rows)
        seconds, errors = [], []
        for metric in (None, metric_for(columns, None), metric_for(columns, rows)):
            took, codes = timed(codes_of, weight, forms, made, metric, SWEEPS, "matrix")
            seconds.append(took)
            if metric is not None:
                change, side = grids.values(codes) - weight, None if metric.rows is None else rows
                nearest = grids.values(grids.nearest(weight)) - weight
                errors.append(float(objective(change, side, columns).mean() / objective(nearest, side, columns).mean()))
        width = math.sqrt(m * n)
        grew = f"{math.log(seconds[2] / last[1]) / math.log(width / last[0]):.1f}" if last and last[0] != width else ""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        numbers = " | ".join(f"{value:.2f}" for value in (eigen, *seconds, *errors))
        print(f"| {shape} | {numbers} | {grew} | {peak:.1f} |", flush=True)
        last = width, seconds[2]


if __name__ == "__main__":
    main()
