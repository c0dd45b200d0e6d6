"""Statistics and factors of a Llama-3.1-8B-shaped model with random weights, against the arithmetic floor of the device.

    python -m tests.benchmarks.gpu_8b                        # on a GPU of the H200's class: 32 layers, 256 windows of 2,048
    python -m tests.benchmarks.gpu_8b --small --device cpu   # the same script at a size for a CPU, in a minute
    python -m tests.benchmarks.gpu_8b --forecast-only        # no model: what 8B and 70B take, by the forecast

The model is made on the device, in bfloat16. By default `collect` runs on one layer at a time, whose sums are given up before the
next, so that the device holds one layer as in streaming; every layer gets the embedded tokens, the same work as hidden states,
which are not moved between host and device here. `--whole` runs it once on the model, with the sums of all layers on the device:
82 GB in float64 beside 16 GB of weights. Then each of the layer's matrices is fitted for every rank up to break-even.

Printed: seconds, the share of the arithmetic floor and peak memory per stage; how far bfloat16 is from float32, in moments and in
the calibration error of factors; and the forecasts. The floor counts what cannot be done without (half of symmetric products,
10/3 n^3 of an eigenproblem: tridiagonal form and vectors), each at the rate of a product in its number format, measured here.
"""

import argparse
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaModel

from winnow.calibration.statistics import collect, collect_by_block
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed
from winnow.metrics.base import METRICS
from winnow.models.architectures import Matrix, matrices_of
from winnow.numerics.host import on_host
from winnow.structures.base import STRUCTURES, Fit, Problem

ROOT = Path(__file__).parents[2]
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE |= {"num_hidden_layers": 32, "vocab_size": 128256}
HUGE = {**LARGE, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2, "vocab_size": 1024}


@dataclass
class Stage:
    """Seconds of a stage, its floor in seconds, and the most memory it held on the device (on a CPU: of the process)."""

    seconds: float = 0.0
    floor: float = 0.0
    peak: float = 0.0


def make(config: dict[str, int], layers: int, dtype: torch.dtype, device: str, seed: int) -> tuple[LlamaModel, list[Matrix]]:
    """A model of that many layers with random weights, the same in every dtype, and its matrices."""
    torch.manual_seed(seed)
    own = LlamaConfig(**{**config, "num_hidden_layers": layers}, max_position_embeddings=1 << 15)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaModel(own)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():  # and not the buffers: frequencies of positions stay in float32, as a loader leaves them
        parameter.data = parameter.data.to(dtype)
    model = model.eval().requires_grad_(False)
    return model, matrices_of("llama", {name: {"shape": list(t.shape)} for name, t in model.state_dict().items()})


def rates(device: str) -> dict[torch.dtype, float]:
    """Operations per second of a square product, the best of three, by number format."""
    n = 8192 if device != "cpu" else 1024
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        one = torch.randn(n, n, device=device).to(dtype)
        found[dtype] = 2 * n**3 / min(clock(lambda one=one: one @ one, device)[0] for _ in range(4))
    return found


def clock(function, device: str) -> tuple[float, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peak(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    most = float(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return most


def statistics_floor(matrices: list[Matrix], width: int, tokens: int, length: int, rate: dict[torch.dtype, float]) -> float:
    widths = {(m.layer, m.site): m.shape[1] for m in matrices}
    grams = sum(n * n for n in widths.values())
    cross = sum(2 * n * width for (_, site), n in widths.items() if site == "ffn_hidden")
    forward = sum(2 * m.shape[0] * m.shape[1] for m in matrices) + 2 * length * width * len({m.layer for m in matrices})
    return tokens * (forward + grams + cross) / max(rate[torch.bfloat16], rate[torch.float32])  # a CPU may be slow in 16 bits


def factors_floor(matrices: list[Matrix], rate: dict[torch.dtype, float]) -> float:
    single = double = 0.0
    for matrix in matrices:
        m, n = matrix.shape
        k, rank = min(m, n), m * n // (m + n)
        double += 10 / 3 * k**3
        if m <= n:
            single += m * n * n + 2 * m * m * n + 2 * m * n * rank  # half of W G, its product with W^T, U^T W
        else:
            single += 2 * m * n * n + 2 * m * n * rank  # W L, half of its square, W L V
            double += n**3 / 3 + n * n * rank  # L, V^T L^-1
    return single / rate[torch.float32] + double / rate[torch.float64]


def fits(model: LlamaModel, matrices: list[Matrix], sites: dict[str, dict[str, torch.Tensor]], device: str) -> dict[str, Fit]:
    """The fit of every matrix in the Gram metric, for every rank."""
    structure, metric, found = STRUCTURES.build({"kind": "low_rank"}), METRICS.build({"kind": "gram"}), {}
    for matrix in matrices:
        weight = model.get_submodule(matrix.module).weight.double()
        gram = {"gram": sites[matrix.site]["gram"].to(device).double()}
        problem = Problem([matrix], {matrix.name: weight}, {matrix.name: gram}, metric, torch.finfo(torch.float32).eps)
        fit = structure.fit(problem, structure.largest([matrix]))
        tensors = {name: on_host(t.float()) for name, t in fit.tensors.items()}
        found[matrix.role] = Fit(tensors, fit.error.cpu(), fit.spectrum.cpu())
    return found


def run(given: argparse.Namespace, config: dict[str, int]) -> dict[str, Stage]:
    device, layers, width = given.device, config["num_hidden_layers"], config["hidden_size"]
    rate = rates(device)
    print("products a second: " + ", ".join(f"{str(t).removeprefix('torch.')} {r:.2e}" for t, r in rate.items()))
    stages = {"statistics": Stage(), "factors": Stage()}
    windows = torch.randint(0, config["vocab_size"], (given.windows, given.length), generator=torch.Generator().manual_seed(0))
    batch = max(1, given.batch_tokens // given.length)
    for part in [layers] if given.whole else [1] * layers:
        model, matrices = make(config, part, torch.bfloat16, device, len(stages))
        peak(device)
        passed = collect(model, matrices, windows, batch, torch.float32)
        for _ in range(part):
            took, (layer, sites) = clock(lambda passed=passed: next(passed), device)
            own, mine = stages["statistics"], [m for m in matrices if m.layer == layer]
            own.seconds, own.peak = own.seconds + took, max(own.peak, peak(device))
            own.floor += statistics_floor(mine, width, windows.numel(), given.length, rate)
            took, _ = clock(lambda model=model, mine=mine, sites=sites: fits(model, mine, sites, device), device)
            own = stages["factors"]
            own.seconds, own.peak = own.seconds + took, max(own.peak, peak(device))
            own.floor += factors_floor(mine, rate)
    print(f"\n{layers} layers, {7 * layers} matrices, {given.windows} windows of {given.length:,}, batches of {batch}\n")
    print("| stage | seconds | of the arithmetic floor's rate | peak memory, GB |\n|---|---:|---:|---:|")
    for name, stage in stages.items():
        print(f"| {name} | {stage.seconds:.1f} | {stage.floor / stage.seconds:.0%} | {stage.peak / 1e9:.1f} |")
    print(f"| both | {sum(s.seconds for s in stages.values()):.1f} | | |")
    return stages


def agreement(given: argparse.Namespace, config: dict[str, int]) -> None:
    """One layer, the same weights, in bfloat16 and in float32: moments, and factors at half of their ranks."""
    windows = torch.randint(0, config["vocab_size"], (min(8, given.windows), given.length))
    batch, found = max(1, given.batch_tokens // given.length), {}
    for dtype in (torch.bfloat16, torch.float32):
        model, matrices = make(config, 1, dtype, given.device, 0)
        sites = dict(collect(model, matrices, windows, batch, torch.float32))[0]
        found[dtype] = sites, fits(model, matrices, sites, given.device)
    (rough, coarse), (exact, fine) = found[torch.bfloat16], found[torch.float32]
    print("\nbfloat16 from float32: the Gram matrix, and the calibration error of the factors at half of their ranks; relative\n")
    print("| matrix | Gram matrix | calibration error |\n|---|---:|---:|")
    for matrix in matrices:
        gram = exact[matrix.site]["gram"].double()
        apart = float((rough[matrix.site]["gram"].double() - gram).norm() / gram.norm())
        weight = model.get_submodule(matrix.module).weight.double().cpu()
        half = (len(fine[matrix.role].error) - 1) // 2
        errors = []
        for fit in (coarse[matrix.role], fine[matrix.role]):
            rest = weight - fit.tensors["left"][:, :half].double() @ fit.tensors["right"][:half].double()
            errors.append(float(((rest @ gram) * rest).sum()) ** 0.5)
        print(f"| {matrix.role} | {apart:.1e} | {errors[0] / errors[1] - 1:.1e} |")


def streamed(given: argparse.Namespace, config: dict[str, int]) -> None:
    """Two layers of the model, read from files block by block, hidden states in files, against the same two in memory."""
    windows = torch.randint(0, config["vocab_size"], (given.windows, given.length), generator=torch.Generator().manual_seed(1))
    batch, apart, seconds = max(1, given.batch_tokens // given.length), 0.0, 0.0
    with tempfile.TemporaryDirectory() as place:
        model, matrices = make(config, 2, torch.bfloat16, given.device, 0)
        model.save_pretrained(place)
        model = load_model(place, "bfloat16", given.device)  # whose buffers are made as those of a streamed one
        expected = dict(collect(model, matrices, windows, batch, torch.float32))
        del model
        peak(given.device)
        by_block = Streamed(place, "bfloat16", given.device, Path(place) / "moments", given.length)
        found = collect_by_block(by_block, matrices, windows, batch, torch.float32)
        for _ in expected:
            took, (layer, sites) = clock(lambda: next(found), given.device)
            seconds += took
            for site, values in sites.items():
                gram = expected[layer][site]["gram"]
                apart = max(apart, float((values["gram"] - gram).norm() / gram.norm()))
        most = peak(given.device)
        found.close()
        by_block.clear()
    print(f"\nstreamed, two layers: {seconds / 2:.1f} s a layer, peak memory {most / 1e9:.1f} GB;", end=" ")
    print(f"Gram matrices differ from those in memory by {apart:.1e}, relative")


def forecasts(given: argparse.Namespace, stages: dict[str, Stage] | None) -> None:
    """What 8B and 70B take by `winnow.planning.forecast` on an H200, and the floor of two stages at assumed rates."""
    from winnow.models.shape import Shape
    from winnow.planning.config import load
    from winnow.planning.forecast import forecast
    from winnow.planning.plan import Plan
    from winnow.planning.rates import DEVICES

    rate = {torch.bfloat16: given.bfloat16, torch.float32: given.float32, torch.float64: given.float64}
    rates = ", ".join(f"{str(t).removeprefix('torch.')} {r:.1e}" for t, r in rate.items())
    print("\nForecasts: config/models/llama-3.1-8b.yaml and llama-3.1-70b.yaml, at the rates of `device=h200`; the floor at")
    print(f"{rates} products a second. Shares of its rate are those of this device, if it ran: a GPU's share in eigenproblems")
    print("is smaller than a CPU's.")
    for name, shape in (("llama-3.1-8b", LARGE), ("llama-3.1-70b", HUGE)):
        plan = Plan(load(yaml.safe_load((ROOT / "config" / "models" / f"{name}.yaml").read_text(encoding="utf-8"))), ROOT)
        with torch.device("meta"):
            model = LlamaModel(LlamaConfig(**shape))
        matrices = matrices_of("llama", {key: {"shape": list(t.shape)} for key, t in model.state_dict().items()})
        numbers = sum(t.numel() for t in model.parameters()) + shape["vocab_size"] * shape["hidden_size"]  # and the head
        of = Shape(matrices, [], numbers, 2 * numbers, 2, shape["vocab_size"], shape["hidden_size"], shape["num_hidden_layers"])
        print(f"\n{name}: {numbers:,} numbers\n\n| stage | jobs | memory, GB | disk, GB | seconds a job |")
        print("|---|---:|---:|---:|---:|")
        for work in forecast(plan, {name: of}):
            each = work.seconds(DEVICES["h200"]) / work.jobs
            print(f"| {work.stage} | {work.jobs} | {work.memory / 1e9:.1f} | {work.disk / 1e9:.1f} | {each:,.0f} |")
        floors = {
            "statistics": statistics_floor(matrices, shape["hidden_size"], 256 * 2048, 2048, rate),
            "factors": factors_floor(matrices, rate),
        }
        print("\nfloor of one method: " + ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in floors.items()))
        for stage, own in (stages or {}).items():
            print(f"at the share of the floor's rate reached above: {stage} {floors[stage] * own.seconds / own.floor:,.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of 2 layers, 8 windows of 256")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, each of its full size")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="one pass through all layers, with all sums on the device")
    parser.add_argument("--forecast-only", action="store_true")
    for name, value in (("bfloat16", 6e14), ("float32", 4.5e13), ("float64", 4.5e13)):
        parser.add_argument(f"--{name}", type=float, default=value, help="products a second that forecasts assume; an H200's")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = dict(SMALL if given.small else LARGE)
    config["num_hidden_layers"] = given.layers or config["num_hidden_layers"]
    given.windows, given.length = given.windows or (8 if given.small else 256), given.length or (256 if given.small else 2048)
    stages = None
    if not given.forecast_only:
        stages = run(given, config)
        agreement(given, config)
        streamed(given, config)
    forecasts(given, stages)


if __name__ == "__main__":
    main()
