"""What allocations are worth: predicted against measured loss of single matrices, and whole models by kind of allocation.

    python tests/benchmarks/allocation.py                          # the demo model
    python tests/benchmarks/allocation.py --model DIR --calibration train.txt --evaluation valid.txt --format raw

Matrices are multiplied out in the dense model, in memory, with the package's own statistics, fits and allocations. Single
matrices are measured on calibration windows, whole models on the evaluation text; nothing is chosen by the latter.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from winnow.allocation.groups import Group, allocate
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect
from winnow.checkpoint.loading import load_model
from winnow.data.texts import read_rows
from winnow.data.tokens import calibration_windows, encode, evaluation_windows, load_tokenizer
from winnow.factors.predict import unseen
from winnow.io.artifacts import write_json
from winnow.metrics.base import METRICS
from winnow.models.files import ModelFiles, tensor_bytes
from winnow.models.retrieve import describe
from winnow.structures.base import STRUCTURES, Problem

DEMO = Path(__file__).resolve().parents[2] / "resources"
KEEPS = (0.9, 0.8, 0.6, 0.4)
ALLOCATIONS = {
    "uniform": {"kind": "uniform"},
    "per_type": {"kind": "per_type"},
    "energy": {"kind": "energy"},
    "greedy, metric": {"kind": "greedy"},
    "greedy, predicted": {"kind": "greedy", "objective": "predicted"},
    "ilp, metric": {"kind": "ilp", "objective": "metric"},
    "ilp, relative": {"kind": "ilp", "objective": "relative"},
    "ilp, predicted": {"kind": "ilp"},
    "ilp, predicted, none dense": {"kind": "ilp", "leave_dense": False},
}


class Bench:
    """A dense model whose matrices can be exchanged, with its statistics and windows."""

    def __init__(self, a: argparse.Namespace):
        self.model = load_model(a.model, "float32", "cpu")
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "model.json", describe(a.model))
            self.files = ModelFiles(Path(folder) / "model.json")
        tokenizer = load_tokenizer(a.model)
        source = {"format": a.format, "dataset": None, "separator": None, "start": 0, "stop": None, "column": "text"}
        texts = ["\n\n".join(read_rows({**source, "files": [str(f)]})) for f in (a.calibration, a.evaluation)]
        drawn = calibration_windows(encode(tokenizer, texts[0], True), a.windows, a.length, a.seed)
        self.calibration = torch.from_numpy(drawn)
        scored = evaluation_windows(encode(tokenizer, texts[1], False), "p1", a.length, None, a.scored, tokenizer.bos_token_id)
        self.evaluation = torch.from_numpy(scored[0])
        self.dense = {m.module: self.model.get_submodule(m.module).weight.detach().clone() for m in self.files.matrices}
        self.moments = dict(collect(self.model, self.files.matrices, self.calibration, 8, torch.float64))
        labels = (torch.float64, "model", a.seed)
        self.gradients = dict(collect_gradients(self.model, self.files.matrices, self.calibration, 8, *labels))
        self.groups: dict[str, list[Group]] = {}
        self.factors: dict[str, dict[str, dict[str, torch.Tensor]]] = {}

    def fit(self, metric: str) -> None:
        structure = STRUCTURES.build({"kind": "low_rank"})
        self.groups[metric], self.factors[metric] = [], {}
        for m in self.files.matrices:
            site, output = self.moments[m.layer][m.site], self.gradients[m.layer][m.role]
            problem = Problem(
                [m], {m.name: self.files.weight(m)}, {m.name: site}, METRICS.build({"kind": metric}), outputs={m.name: output}
            )
            fit = structure.fit(problem, structure.largest([m]))
            predicted = structure.predicted(replace(problem, sites={m.name: unseen(site)}), fit.tensors).tolist()
            numbers = [structure.numbers([m], size, fit.tensors) for size in range(len(fit.error))]
            unit = tensor_bytes({"shape": [1], "dtype": self.files.tensors[f"{m.module}.weight"]["dtype"]})
            fixed = self.files.dense_bytes([m]) - m.shape[0] * m.shape[1] * unit
            counts = (unit, fixed, self.files.dense_bytes([m]), numbers, fit.error.tolist(), predicted)
            self.groups[metric].append(Group(m.name, [m], structure, *counts))
            self.factors[metric][m.name] = fit.tensors

    def put(self, metric: str, sizes: dict[str, int | None]) -> None:
        """Exchange the matrices that `sizes` names; None puts the dense one back."""
        for m in (m for m in self.files.matrices if m.name in sizes):
            weight, size, fit = self.dense[m.module], sizes[m.name], self.factors[metric][m.name]
            if size is not None:
                weight = fit["left"][:, :size] @ fit["right"][:size]
                weight = weight.T if m.transposed else weight
            with torch.no_grad():
                self.model.get_submodule(m.module).weight.copy_(weight)

    @torch.no_grad()
    def log_probabilities(self, windows: torch.Tensor) -> torch.Tensor:
        """(windows, length, vocabulary)"""
        return torch.cat([self.model(input_ids=b.long(), use_cache=False).logits.log_softmax(-1) for b in windows.split(8)])

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """(windows,): nats per token."""
        parts = []
        for batch in windows.split(8):
            picked = self.log_probabilities(batch)[:, :-1].gather(-1, batch[:, 1:, None].long())
            parts.append(-picked[..., 0].double().mean(1))
        return torch.cat(parts)


def options(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--model", type=Path, default=DEMO / "models" / "demo")
    parser.add_argument("--calibration", type=Path, default=DEMO / "texts" / "demo" / "calibration.jsonl")
    parser.add_argument("--evaluation", type=Path, default=DEMO / "texts" / "demo" / "evaluation.jsonl")
    parser.add_argument("--format", default="jsonl", choices=["raw", "lines", "jsonl"])
    for key, value in {"length": 256, "windows": 128, "scored": 64, "single": 16, "seed": 0}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    return parser


def single(bench: Bench, metric: str, windows: torch.Tensor) -> None:
    """Predicted against measured, one matrix at a time, at shares of its largest size."""
    dense, base = bench.log_probabilities(windows), bench.loss(windows)
    rows = []
    for g in bench.groups[metric]:
        for share in (0.05, 0.2, 0.5, 0.9):
            size = max(1, round(share * g.largest))
            bench.put(metric, {g.name: size})
            now = bench.log_probabilities(windows)
            kl = float((dense.exp() * (dense - now)).sum(-1).mean())
            rows.append((g.predicted[size], float((bench.loss(windows) - base).mean()), kl, g.error[size]))
            bench.put(metric, {g.name: None})
    predicted, nats, kl, error = np.array(rows).T
    print(f"\n{metric}: {len(rows)} single-matrix truncations, {len(windows)} calibration windows")
    print("| what is compared | Spearman with nats | with KL | median nats / predicted | median KL / predicted |")
    print("|---|---:|---:|---:|---:|")
    ratios = f"{np.median(nats / predicted):.2f} | {np.median(kl / predicted):.2f}"
    rho = [[spearmanr(a, b).statistic for b in (nats, kl)] for a in (predicted, error)]
    print(f"| predicted loss | {rho[0][0]:.3f} | {rho[0][1]:.3f} | {ratios} |")
    print(f"| error of the metric | {rho[1][0]:.3f} | {rho[1][1]:.3f} | | |", flush=True)


def whole(bench: Bench, metric: str) -> None:
    """Loss above dense of all matrices together, by allocation and budget; paired standard errors over windows."""
    base = bench.loss(bench.evaluation)
    print(f"\n{metric}, low_rank, all block matrices: nats per token above dense ({float(base.mean()):.4f})")
    print(f"| allocation | {' | '.join(map(str, KEEPS))} | left dense |\n|---|{'---:|' * len(KEEPS)}---:|")
    for name, allocation in ALLOCATIONS.items():
        cells, dense = [], []
        for keep in KEEPS:
            sizes = allocate(bench.groups[metric], {"keep_bytes": keep, "allocation": allocation}).sizes
            bench.put(metric, sizes)
            above = bench.loss(bench.evaluation) - base
            cells.append(f"{float(above.mean()):.4f} ± {float(above.std()) / len(above) ** 0.5:.4f}")
            dense.append(str(sum(size is None for size in sizes.values())))
        print(f"| {name} | {' | '.join(cells)} | {', '.join(dense)} |", flush=True)
    bench.put(metric, dict.fromkeys(bench.factors[metric]))


if __name__ == "__main__":
    arguments = options(__doc__.splitlines()[0]).parse_args()
    bench = Bench(arguments)
    for metric in ("gram", "two_sided"):
        bench.fit(metric)
        whole(bench, metric)
    single(bench, "gram", bench.calibration[: arguments.single])
