"""Factors for five budgets of every matrix of one block: winnow against the published recipe, in one process, in turns.

    python tests/benchmarks/factors.py [--widths 512 1024 2048] [--threads 2] [--repeats 1] [--recipe-to 2048]

The recipe is SVD-LLM's (arXiv 2403.07378): a Gram matrix per linear layer, its Cholesky factor, and for every budget the inverse
of that and a full SVD of W L, in float32 as published. winnow: a Gram matrix per distinct input, one eigenproblem of the smaller
side in float64, and a truncation per budget. Llama-3.2-1B's block at width 2048 (ffn 4 times, keys and values a quarter);
weights and inputs are random, inputs with a spectrum like i^-1. Printed: recipe over winnow in time, for every matrix and for the
block without and with Gram matrices; the largest excess of winnow's calibration error over the recipe's, which must not be above
rounding; and how both grow with the width. Above --recipe-to the recipe is not run but forecast, as eight times its time at half
the width, and marked so.
"""

import argparse
import time

import torch

from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix
from winnow.numerics.products import gram_of
from winnow.structures.base import STRUCTURES, Problem

CLOCK = [time.perf_counter]
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

FIRST = ("q_proj", "o_proj", "gate_proj", "down_proj")  # of those that read the same input


def inputs(width: int, tokens: int) -> torch.Tensor:
    """(tokens, width): correlated channels whose second moment has eigenvalues like i^-1."""
    scales = torch.arange(1, width + 1).float().rsqrt()
    mix = torch.linalg.qr(torch.randn(width, min(width, 512))).Q  # a cheap rotation of the leading ones
    x = torch.randn(tokens, width) * scales
    return x + (x[:, : mix.shape[1]] * 3) @ mix.T


def recipe_gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def recipe(weight: torch.Tensor, gram: torch.Tensor, ranks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two factors per rank, as SVD-LLM's `whitening` makes them once per budget; a Gram matrix not definite is shifted."""
    lower, info = torch.linalg.cholesky_ex(gram.double())
    if int(info):
        shift = 1e-6 - torch.linalg.eigvalsh(gram.double())[0]
        lower = torch.linalg.cholesky(gram.double() + shift * torch.eye(len(gram)))
    lower = lower.float()
    found = []
    for rank in ranks:
        inverse = torch.linalg.inv(lower)
        u, s, vt = torch.linalg.svd(weight @ lower, full_matrices=False)
        root = s[:rank].sqrt()
        found.append((u[:, :rank] * root, (root[:, None] * vt[:rank]) @ inverse))
    return found


def ours(matrix: Matrix, weight: torch.Tensor, gram: torch.Tensor, ranks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    structure, metric = STRUCTURES.build({"kind": "low_rank"}), METRICS.build({"kind": "gram"})
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
    began = CLOCK[0]()
    found = function(*arguments)
    return CLOCK[0]() - began, found


def block(width: int, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of both for one block: {recipe, recipe gram, winnow, winnow gram}; 0 for a recipe that is not run."""
    torch.manual_seed(0)
    roles = {role: ROLES[role] for role in given.roles}
    sites = {site: inputs(int(n * width), given.tokens or 8 * width) for _, n, site in roles.values()}
    total = dict.fromkeys(("recipe", "recipe gram", "winnow", "winnow gram"), 0.0)
    grams: dict[str, torch.Tensor] = {}
    for role, (rows, columns, site) in roles.items():
        m, n = int(rows * width), int(columns * width)
        x, weight = sites[site], torch.randn(m, n) / n**0.5
        matrix = Matrix(0, role, f"block.{role}", site, (m, n), transposed=False, bias=False)
        ranks = [int(keep * m * n / (m + n)) for keep in KEEPS]
        spent, excess = dict.fromkeys(total, 0.0), []
        for _ in range(given.repeats):
            if width <= given.recipe_to:
                took, gram = timed(recipe_gram, x)
                spent["recipe gram"] += took / given.repeats
            if role in FIRST or site not in grams:
                took, grams[site] = timed(gram_of, x)
                spent["winnow gram"] += took / given.repeats
            took, found = timed(ours, matrix, weight, grams[site], ranks)
            spent["winnow"] += took / given.repeats
            if width <= given.recipe_to:
                took, theirs = timed(recipe, weight, gram, ranks[-given.budgets :])
                spent["recipe"] += took / given.repeats * len(ranks) / given.budgets
                pairs = zip(found[-given.budgets :], theirs, strict=True)
                excess += [error(x, weight, a) - error(x, weight, b) for a, b in pairs]
        if excess:
            print(f"| {role} | {m} x {n} | {spent['recipe'] / spent['winnow']:.1f} | {max(excess):.1e} |", flush=True)
        else:
            print(f"| {role} | {m} x {n} | not run | |", flush=True)
        total = {name: total[name] + spent[name] for name in total}
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, help="by default eight times the width, twice that of the widest input")
    parser.add_argument("--roles", nargs="+", choices=list(ROLES), default=list(ROLES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--budgets", type=int, default=len(KEEPS), help="of the recipe that are run; its time is scaled to all")
    parser.add_argument("--recipe-to", type=int, default=2048, help="largest width at which the recipe is run")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that others use; with one thread")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.cpu_time:
        CLOCK[0] = time.process_time
    found: dict[int, dict[str, float]] = {}
    for width in sorted(given.widths):
        print(f"\nwidth {width}\n\n| matrix | shape | recipe / winnow, factors | largest excess of error |\n|---|---|---:|---:|")
        found[width] = block(width, given)
    print("\n| width | winnow, s | recipe, s | recipe / winnow | with Gram matrices | winnow grew by | recipe grew by |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    last: dict[str, float] = {}
    for width, own in found.items():
        note = ""
        if not own["recipe"]:
            if not (last and found.get(width // 2) is last):
                raise SystemExit(f"no forecast for the recipe at width {width}: give --widths {width // 2} too")
            own |= {"recipe": 8 * last["recipe"], "recipe gram": 4 * last["recipe gram"]}
            note = " (forecast)"
        grown = [f"{own[name] / last[name]:.1f}" if last else "" for name in ("winnow", "recipe")]
        both = (own["recipe"] + own["recipe gram"]) / (own["winnow"] + own["winnow gram"])
        print(
            f"| {width} | {own['winnow']:.2f} | {own['recipe']:.1f}{note} | {own['recipe'] / own['winnow']:.1f} | {both:.1f} "
            f"| {grown[0]} | {grown[1]} |"
        )
        last = own


if __name__ == "__main__":
    main()
