"""Predicted and measured loss of rounding: single matrices, one at a time, and whole models.

    python -m tests.benchmarks.rounded_predictions --model DIR --calibration train.txt --evaluation test.txt --format raw

Every matrix is rounded with feedback on both sides to 2, 3, 4 and 5 bits in groups of 32 and 128, the others are dense; then all
matrices with the forms of `rounded_two_sided` that the integer programme chooses at KEEPS of the bytes. Losses are predicted as
in the workflow, and measured on the evaluation text, in float64 from float32 logits: the divergence KL(dense || rounded) and the
loss, in nats per token. A divergence below FLOOR times that of the dense model in float64 from itself in float32 is left out.

Prints tables, and writes a row for all single matrices and one for every budget to docs/results/rounded_predictions.csv, instead
of earlier ones of the model.
"""

from __future__ import annotations

import argparse
import copy
import csv
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from tests.benchmarks.allocation import Bench, options
from winnow.allocation.groups import Group, allocate
from winnow.factors.predict import on_other_text, unseen
from winnow.factors.shrinkage import expected
from winnow.metrics.base import METRICS
from winnow.models.files import tensor_bytes
from winnow.numerics.rounding import multiplied, unpacked
from winnow.planning.presets import FORMS
from winnow.structures.base import STRUCTURES, Problem

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "rounded_predictions.csv"
KEEPS = (0.28, 0.25, 0.22, 0.20, 0.16, 0.14, 0.12)
BITS, FLOOR = (2, 3, 4, 5), 10.0


def groups_of(bench: Bench) -> tuple[list[Group], dict[str, list[torch.Tensor]]]:
    """All matrices with their predicted losses, and the rounded weights (out, in) of each by size."""
    structure = STRUCTURES.build(FORMS | {"rounding": "feedback", "group": [32, FORMS["group"]]})
    metric, groups, weights = METRICS.build({"kind": "two_sided"}), [], {}
    for m in bench.files.matrices:
        site = {name: bench.moments[m.layer][m.site][name] for name in ("gram", "count", "max_abs")}
        output = bench.gradients[m.layer][m.role]
        weight, (_, n) = bench.files.weight(m), m.shape
        fit = structure.fit(
            Problem([m], {m.name: weight}, {m.name: site}, metric, outputs={m.name: output}), structure.limit([m])
        )
        other = {"gradient_gram": expected(output["gradient_gram"], int(site["count"]))}
        sites = {name: unseen(found) for name, found in on_other_text({m.name: site}).items()}
        predicted = structure.predicted(Problem([m], {m.name: weight}, sites, None, outputs={m.name: other}), fit.tensors)
        weights[m.name] = [
            multiplied(
                unpacked(fit.tensors[f"{size}.steps"], n, form.bits).float(),
                fit.tensors[f"{size}.scale"].view(torch.float16).float(),
                form.group,
            )
            for size, form in enumerate(structure.forms(*m.shape), start=1)
        ]
        unit = tensor_bytes({"shape": [1], "dtype": bench.files.tensors[f"{m.module}.weight"]["dtype"]})
        dense = bench.files.dense_bytes([m])
        small = frozenset(
            size for size, form in enumerate(structure.forms(*m.shape), start=1) if form.group == 32
        )  # not of the preset
        fixed, numbers = dense - m.shape[0] * n * unit, [0] * len(fit.error)
        counts = (unit, fixed, dense, numbers, fit.error.tolist(), predicted.tolist())
        groups.append(Group(m.name, [m], structure, *counts, left_out=small | {0}))
    return groups, weights


class Measure:
    """Divergence from the dense model and loss above it, on some windows of the evaluation text."""

    def __init__(self, bench: Bench, windows: int):
        self.bench, self.windows = bench, bench.evaluation[:windows]
        self.dense = self._outputs(copy.deepcopy(bench.model).double())
        self.floor = self()[0]
        self.dense = self._outputs(bench.model)

    @torch.no_grad()
    def _outputs(self, model: torch.nn.Module) -> torch.Tensor:
        """(windows, length, vocabulary): logarithms of probabilities."""
        parts = [model(input_ids=part.long(), use_cache=False).logits.double() for part in self.windows.split(8)]
        return torch.cat(parts).log_softmax(-1)

    def __call__(self) -> tuple[float, float, float, float]:
        """(divergence, its standard error, nats above dense, their standard error) per token, errors over windows."""
        found, dense = self._outputs(self.bench.model), self.dense
        kl = (dense.exp() * (dense - found)).sum(-1).mean(1)
        nats = (dense - found)[:, :-1].gather(-1, self.windows[:, 1:, None].long())[..., 0].mean(1)
        return tuple(float(value) for part in (kl, nats) for value in (part.mean(), part.std() / len(part) ** 0.5))


def put(bench: Bench, weights: dict[str, list[torch.Tensor]], sizes: dict[str, int | None]) -> None:
    """Exchange the matrices that `sizes` names; None puts the dense one back."""
    for m in (m for m in bench.files.matrices if m.name in sizes):
        size = sizes[m.name]
        weight = bench.dense[m.module]
        if size is not None:
            weight = weights[m.name][size - 1].T if m.transposed else weights[m.name][size - 1]
        with torch.no_grad():
            bench.model.get_submodule(m.module).weight.copy_(weight)


def single(bench: Bench, groups: list[Group], weights: dict[str, list[torch.Tensor]], windows: int) -> dict[str, object]:
    measure, rows = Measure(bench, windows), []
    for g in groups:
        for size, form in enumerate(g.structure.forms(*g.matrices[0].shape), start=1):
            if form.bits in BITS:
                put(bench, weights, {g.name: size})
                rows.append((g.predicted[size], *measure()))
        put(bench, weights, {g.name: None})
    predicted, kl, error, nats, _ = np.array(rows).T
    seen = kl > FLOOR * measure.floor
    ratio = np.quantile((kl / predicted)[seen], (0.05, 0.5, 0.95))
    rho = [spearmanr(predicted[seen], found[seen]).statistic for found in (kl, nats)]
    print(f"\n{len(rows)} matrices rounded alone, {windows} windows; {sum(~seen)} below {FLOOR * measure.floor:.1e} left out;")
    noise, shares = np.median(error / kl), ", ".join(f"{r:.2f}" for r in ratio)
    print(f"predicted {predicted.min():.1e} to {predicted.max():.1e}; median standard error {noise:.1%} of the divergence")
    print(f"Spearman with divergence {rho[0]:.3f}, with nats {rho[1]:.3f}; divergence / predicted at 5, 50, 95 %: {shares}")
    names = ("ratio_5", "ratio", "ratio_95", "spearman_kl", "spearman_nats")
    return {"options": len(rows), "left_out": int(sum(~seen)), **dict(zip(names, (*ratio, *rho), strict=True))}


def whole(bench: Bench, groups: list[Group], weights: dict[str, list[torch.Tensor]]) -> list[dict[str, object]]:
    measure, rows = Measure(bench, len(bench.evaluation)), []
    print("| kept | predicted | divergence | nats | divergence / predicted |\n|---:|---:|---:|---:|---:|")
    for keep in KEEPS:
        try:
            sizes = allocate(groups, {"keep_bytes": keep, "allocation": {"kind": "ilp"}}).sizes
        except ValueError as error:  # fewer bytes than the smallest forms
            print(f"| {keep} | {error} |")
            continue
        put(bench, weights, sizes)
        kl, error, nats, nats_error = measure()
        predicted = sum(g.predicted[size] for g in groups if (size := sizes[g.name]) is not None)
        print(
            f"| {keep} | {predicted:.4f} | {kl:.4f} ± {error:.4f} | {nats:.4f} ± {nats_error:.4f} | {kl / predicted:.2f} |",
            flush=True,
        )
        rows.append({
            "keep_bytes": keep, "predicted": predicted, "kl": kl, "kl_error": error, "nats": nats, "nats_error": nats_error,
            "ratio": kl / predicted,
        })  # fmt: skip
    put(bench, weights, dict.fromkeys(weights))
    return rows


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    given: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given)
    groups, weights = groups_of(bench)
    rows = [*whole(bench, groups, weights), single(bench, groups, weights, given.single)]
    columns = [
        "model", "keep_bytes", "options", "left_out", "predicted", "kl", "kl_error", "nats", "nats_error", "ratio", "ratio_5",
        "ratio_95", "spearman_kl", "spearman_nats",
    ]  # fmt: skip
    kept = []
    if RESULTS.exists():
        with open(RESULTS, newline="", encoding="utf-8") as stream:
            kept = [row for row in csv.DictReader(stream) if row["model"] != given.model.name]
    rounded = [{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    with open(RESULTS, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({"model": given.model.name, **row} for row in rounded)])


if __name__ == "__main__":
    main()
