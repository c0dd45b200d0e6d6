"""Factors for five budgets of every matrix of one block: winnow against the published recipe, in one process, in turns.

    python tests/benchmarks/factors.py [--width 2048] [--tokens 4096] [--threads 2] [--repeats 1]

The recipe is SVD-LLM's (arXiv 2403.07378): a Gram matrix per linear layer, its Cholesky factor, and for every budget the inverse
of that and a full SVD of W L, in float32 as published. winnow: a Gram matrix per distinct input, one eigenproblem of the smaller
side in float64, and a truncation per budget. Llama-3.2-1B's block at --width 2048 (ffn 4 times, keys and values a quarter);
weights and inputs are random, inputs with a spectrum like i^-1. Printed: recipe over winnow in time (Gram matrices apart), and
the largest excess of winnow's calibration error over the recipe's, which must not be above rounding.
"""

import argparse
import time

import torch

from winnow.architectures import Matrix
from winnow.metrics import metric_of
from winnow.structures import structure_of
from winnow.structures.base import Problem

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
ROLES = {  # role: rows and columns over the width, input
    "q_proj": (1, 1, "attention_input"),
    "k_proj": (0.25, 1, "attention_input"),
    "v_proj": (0.25, 1, "attention_input"),
    "o_proj": (1, 1, "attention_hidden"),
    "gate_proj": (4, 1, "ffn_input"),
    "up_proj": (4, 1, "ffn_input"),
    "down_proj": (1, 4, "ffn_hidden"),
}


def inputs(width: int, tokens: int) -> torch.Tensor:
    """(tokens, width): correlated channels whose second moment has eigenvalues like i^-1."""
    scales = torch.arange(1, width + 1).float().rsqrt()
    mix = torch.linalg.qr(torch.randn(width, min(width, 512))).Q  # a cheap rotation of the leading ones
    x = torch.randn(tokens, width) * scales
    return x + (x[:, : mix.shape[1]] * 3) @ mix.T


def recipe_gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def recipe(weight: torch.Tensor, gram: torch.Tensor, ranks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two factors per rank, as SVD-LLM's `whitening` makes them once per budget."""
    lower = torch.linalg.cholesky(gram.double() + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))).float()
    found = []
    for rank in ranks:
        inverse = torch.linalg.inv(lower)
        u, s, vt = torch.linalg.svd(weight @ lower, full_matrices=False)
        root = s[:rank].sqrt()
        found.append((u[:, :rank] * root, (root[:, None] * vt[:rank]) @ inverse))
    return found


def ours(matrix: Matrix, weight: torch.Tensor, gram: torch.Tensor, ranks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    structure, metric = structure_of({"kind": "low_rank"}), metric_of({"kind": "gram"})
    sites = {matrix.name: {"gram": gram.double()}}
    problem = Problem([matrix], {matrix.name: weight.double()}, sites, metric, torch.finfo(torch.float32).eps)
    fit = structure.fit(problem, structure.largest([matrix]))
    left, right = fit.tensors["left"].float(), fit.tensors["right"].float()
    return [(left[:, :rank], right[:rank]) for rank in ranks]


def error(x: torch.Tensor, weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> float:
    """||X (W - L R)^T||_F / ||X W^T||_F over the calibration tokens, float64."""
    x, weight, left, right = (t.double() for t in (x, weight, *factors))
    return float((x @ weight.T - (x @ right.T) @ left.T).norm() / (x @ weight.T).norm())


def timed(function, *arguments):
    began = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    sites = {site: inputs(int(n * given.width), given.tokens) for _, n, site in ROLES.values()}
    print("| matrix | shape | recipe / winnow, Gram | recipe / winnow, factors of 5 budgets | largest excess of error |")
    print("|---|---|---:|---:|---:|")
    total = {"recipe": 0.0, "ours": 0.0}
    grams: dict[str, torch.Tensor] = {}
    for role, (rows, columns, site) in ROLES.items():
        m, n = int(rows * given.width), int(columns * given.width)
        x, weight = sites[site], torch.randn(m, n) / n**0.5
        matrix = Matrix(0, role, f"block.{role}", site, (m, n), transposed=False, bias=False)
        ranks = [int(keep * m * n / (m + n)) for keep in KEEPS]
        times, excess, gram_times = {"recipe": [], "ours": []}, [], {"recipe": [], "ours": []}
        for _ in range(given.repeats):
            spent, gram = timed(recipe_gram, x)
            gram_times["recipe"].append(spent)
            if site not in grams:
                spent, grams[site] = timed(recipe_gram, x)
                gram_times["ours"].append(spent)
            spent, theirs = timed(recipe, weight, gram, ranks)
            times["recipe"].append(spent)
            spent, found = timed(ours, matrix, weight, grams[site], ranks)
            times["ours"].append(spent)
            excess += [error(x, weight, a) - error(x, weight, b) for a, b in zip(found, theirs, strict=True)]
        mean = {name: sum(values) / len(values) for name, values in times.items()}
        gram_mean = {name: sum(values) / given.repeats for name, values in gram_times.items()}
        for name in total:
            total[name] += mean[name] + gram_mean[name]
        ratio = f"{gram_mean['recipe'] / gram_mean['ours']:.1f}" if gram_mean["ours"] else "shared"
        print(f"| {role} | {m} x {n} | {ratio} | {mean['recipe'] / mean['ours']:.1f} | {max(excess):.1e} |", flush=True)
    print(f"\nthe block, Gram matrices included: recipe / winnow = {total['recipe'] / total['ours']:.1f}")


if __name__ == "__main__":
    main()
