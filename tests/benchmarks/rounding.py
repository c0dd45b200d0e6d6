"""Seconds to round a square matrix with feedback, beside one eigendecomposition of its width, which a factored fit takes.

    python tests/benchmarks/rounding.py [--widths 512 1024 2048] [--bits 3] [--threads 1] [--cpu-time] [--device cpu]

A random matrix with inputs and gradients whose spectra are like i^-1, rounded in groups of 128: to nearest, in the Gram metric
(GPTQ), and on both sides (with the descent), for all `--bits` at once. Printed for every width: seconds, what is left of
the error to nearest in the metric, and how the seconds grew. All is float64.
"""

import argparse
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
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
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

    print("| width | eigendecomposition, s | nearest, s | Gram, s | both sides, s | Gram, error | both sides, error | grew by |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    last = None
    for width in given.widths:
        torch.manual_seed(0)
        weight = torch.randn(width, width, dtype=torch.float64, device=given.device)
        columns, rows = second_moment(width, given.device), second_moment(width, given.device)
        forms = [Form(bits, "full", min(128, width)) for bits in given.bits]
        made = [scaled(weight, form, "unbiased", columns.diagonal()) for form in forms]
        grids = grids_of(forms, made, width)
        eigen, _ = timed(eigh, columns)
        seconds, errors = [], []
        for metric in (None, metric_for(columns, None), metric_for(columns, rows)):
            took, codes = timed(codes_of, weight, forms, made, metric, SWEEPS, "matrix")
            change = grids.values(codes) - weight
            seconds.append(took)
            errors.append([objective(change, side, columns).mean() for side in (None, rows)])
        left = [float(errors[1][0] / errors[0][0]), float(errors[2][1] / errors[0][1])]
        grew = f"{seconds[2] / last:.1f}" if last else ""
        numbers = " | ".join(f"{value:.2f}" for value in (eigen, *seconds, *left))
        print(f"| {width} | {numbers} | {grew} |", flush=True)
        last = seconds[2]


if __name__ == "__main__":
    main()
