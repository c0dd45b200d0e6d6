"""The statistics pass against the plain forward pass and the arithmetic floor, in one process, in turns.

    python tests/benchmarks/statistics_pass.py [--threads 2] [--repeats 3] [--precision float32] [--skip-block] [--device cpu]

Two models: the demo, and one block of Llama-3.2-1B's shape with random weights. The plain forward pass is what calibration runs
elsewhere, the model with its head, which gives logits; that without the head, all that the statistics pass runs, stands beside
it. The floor is the larger of two times, both of rates measured here: the operations of the forward pass and of the second
moments (a Gram matrix counts half, since it is symmetric) over the rate of a float32 product, and the bytes of weights and sums,
once per batch, over the rate of a copy. Printed for several numbers of windows: ratios, medians over the repeats (half the
windows, twice the repeats), with the lowest and the highest; how both grow; and the largest relative difference of a moment from
float64.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

from winnow.calibration.statistics import collect
from winnow.checkpoint.loading import load_model
from winnow.models.architectures import Matrix, matrices_of

CLOCK = [time.perf_counter]
DEMO = Path(__file__).parents[2] / "resources/models/demo"
BLOCK = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 1024}


def sites_of(matrices: list[Matrix]) -> dict[tuple[int, str], int]:
    return {(m.layer, m.site): m.shape[1] for m in matrices}


def costs(matrices: list[Matrix], width: int, length: int) -> tuple[float, float]:
    """(operations per token, bytes per batch) that no pass can do without."""
    weights = sum(m.shape[0] * m.shape[1] for m in matrices)
    widths = sites_of(matrices)
    grams = sum(n * n for n in widths.values())
    cross = sum(n * width for (_, site), n in widths.items() if site == "ffn_hidden")
    attention = 2 * length * width * len({m.layer for m in matrices})  # causal: half of the scores and of their products
    return 2 * weights + attention + grams + 2 * cross, 4 * weights + 2 * 8 * (grams + cross)


def rates(device: str) -> tuple[float, float]:
    """(operations of a float32 product, bytes of a copy) per second; the best of several."""
    one, best = torch.randn(1024, 1024, device=device), [0.0, 0.0]
    line = torch.zeros(1 << 26, device=device)
    for _ in range(5):
        best[0] = max(best[0], 2 * 1024**3 / timed(lambda: one @ one, device))
        best[1] = max(best[1], 2 * 4 * len(line) / timed(line.clone, device))
    return best[0], best[1]


def timed(function, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = CLOCK[0]()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return CLOCK[0]() - began


def compare(name: str, model, matrices: list[Matrix], length: int, counts: list[int], given: argparse.Namespace) -> None:
    precision, batch = getattr(torch, given.precision), max(1, given.batch_tokens // length)
    operations, moved = costs(matrices, model.config.hidden_size, length)
    base = model.base_model
    last: tuple[float, float] | None = None
    print(f"\n{name}: windows of {length}, batches of {batch}, {given.precision}\n")
    print("| windows | statistics / forward | without the head | statistics / floor | forward / its part of it | growth, both |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in counts:
        windows = torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))

        @torch.no_grad()
        def forward(windows=windows, of=base):
            for part in windows.split(batch):
                of(input_ids=part.to(given.device), use_cache=False)

        def passed(windows=windows):
            return list(collect(model, matrices, windows, batch, precision))

        pairs, floors, heads = [], [], []
        for _ in range(given.repeats * max(counts) // count):  # the shorter, the more
            rate, bandwidth = rates(given.device)
            headed = timed(lambda forward=forward: forward(of=model), given.device) if base is not model else None
            pairs.append((timed(forward, given.device), timed(passed, given.device)))
            heads.append(pairs[-1][0] if headed is None else headed)
            floors.append(max(count * length * operations / rate, -(-count // batch) * moved / bandwidth))
        over = sorted(b / a for a, (_, b) in zip(heads, pairs, strict=True))
        headless = statistics.median(b / a for a, b in pairs)
        plain, full, floor = (statistics.median(v) for v in (*zip(*pairs, strict=True), floors))
        share = 2 * sum(m.shape[0] * m.shape[1] for m in matrices) / operations
        grown = f"{plain / last[0]:.2f}, {full / last[1]:.2f}" if last else ""
        print(
            f"| {count} | {statistics.median(over):.2f} ({over[0]:.2f} to {over[-1]:.2f}) | {headless:.2f} | {full / floor:.2f} "
            f"| {plain / (share * floor):.2f} | {grown} |",
            flush=True,
        )
        last = (plain, full)
    exact = dict(collect(model, matrices, windows[:batch], batch, torch.float64))
    found = dict(collect(model, matrices, windows[:batch], batch, torch.float32))
    worst = 0.0
    for layer, sites in exact.items():
        for site, values in sites.items():
            root = values["gram"].diagonal().sqrt()
            apart = (found[layer][site]["gram"].double() - values["gram"]).abs() / (root[:, None] * root).clamp(min=1e-300)
            worst = max(worst, float(apart.max()))
    print(f"\nfloat32 from float64: at most {worst:.1e} of sqrt(E[x_i^2] E[x_j^2])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "float64"], default="float32")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-block", action="store_true", help="the demo only")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that others use; with one thread")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.cpu_time:
        CLOCK[0] = time.process_time
    demo = load_model(DEMO, "float32", given.device)
    matrices = of_model(demo)
    compare("demo", demo, matrices, 256, [16, 32, 64, 128], given)
    if given.skip_block:
        return
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=2048, **BLOCK)
    block = LlamaModel(config).eval().to(given.device)
    compare("block of Llama-3.2-1B's shape", block, of_model(block), 1024, [4, 8], given)


def of_model(model) -> list[Matrix]:
    """The matrices of a model in memory."""
    tensors = {name: {"shape": list(t.shape), "dtype": "F32"} for name, t in model.state_dict().items()}
    return matrices_of(model.config.model_type, tensors)


if __name__ == "__main__":
    main()
