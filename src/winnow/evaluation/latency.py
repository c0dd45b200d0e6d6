"""Time, memory and bytes read of a model compared with the dense one: interleaved in one process, with the dense model twice.

A ratio is the time divided by the dense model's time in the same repeat: below 1 is faster. The control is the dense model
measured as if it were another model; its difference to 1 is the resolution of this machine. The floor of a time is the bytes of
the weights that were read, over the bandwidth of this machine's memory, which is measured too.
"""

from __future__ import annotations

import math
import os
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from winnow.errors import InputError
from winnow.evaluation.machine import ENGINE, READ
from winnow.io.progress import every
from winnow.numerics.kernels import PRODUCT
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rotated import RotatedLinear

if TYPE_CHECKING:
    from winnow.evaluation.results import Case, Machine, Quartiles, Ratio, Resources, Timed, Times
    from winnow.io import specs

SLOT = 0.01  # seconds for which short calls are repeated within one repeat, so that the clock resolution does not matter
COVERAGE = 0.95  # confidence level of the interval of a median
SAME, FASTER, SLOWER = "same within spread", "faster", "slower than dense"
Clock = Callable[[Callable[[], Any]], float]


def clock_of(device: str) -> Clock:
    """A function that measures the seconds of a call: by CUDA events around its kernels, or by the performance counter."""
    return _cuda_seconds if device == "cuda" else _cpu_seconds


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def calls_of(slots: Mapping[str, Callable[[], Any]], clock: Clock, warmup: int) -> int:
    """The number of repetitions of short calls, the same for all, after `warmup` untimed calls of each."""
    for _ in range(warmup):
        for call in slots.values():
            call()
    return max(1, math.ceil(SLOT / max(1e-6, clock(next(iter(slots.values()))))))


def interleaved(slots: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """{name: {phase: [seconds]}}: every slot once per repeat, in reversed order in every other repeat."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in slots}
    for repeat in range(repeats):
        for name in list(slots) if repeat % 2 == 0 else reversed(list(slots)):
            for phase, value in slots[name]().items():
                seconds[name].setdefault(phase, []).append(value)
    return seconds


def timed(call: Callable[[], Any], clock: Clock, calls: int) -> float:
    """Seconds per call, after an untimed call that fills the caches with this model."""
    call()

    def all_calls() -> None:
        for _ in range(calls):
            call()

    return clock(all_calls) / calls


def quartiles(values: list[float]) -> Quartiles:
    """Median and quartiles."""
    q1, median, q3 = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def interval(values: list[float]) -> tuple[float, float]:
    """A distribution-free confidence interval of the median with at least `COVERAGE`, by order statistics; the range for fewer
    than six values, for which there is none."""
    ordered, n = sorted(values), len(values)
    outside, low = 0.0, 0
    while low < n // 2:
        outside += 2 * math.comb(n, low) / 2**n
        if outside > 1 - COVERAGE:
            break
        low += 1
    low = max(low - 1, 0)
    return ordered[low], ordered[n - 1 - low]


def ratios(own: list[float], dense: list[float]) -> Ratio:
    """Median and quartiles of the ratios of all repeats, and the interval of the median. Raises ValueError if not paired."""
    values = [a / b for a, b in zip(own, dense, strict=True)]
    low, high = interval(values)
    return {**quartiles(values), "low": low, "high": high}


def latency_verdict(ratio: Ratio, control: Ratio) -> str:
    """Faster or slower if the interval of the ratio's median excludes 1 and the median is outside of the control's quartiles;
    otherwise the difference is no larger than that of the dense model to itself."""
    if ratio["high"] < 1 and ratio["median"] < control["q1"]:
        return FASTER
    if ratio["low"] > 1 and ratio["median"] > control["q3"]:
        return SLOWER
    return SAME


class Tally(TorchDispatchMode):
    """Counts the operators within it: `weight_bytes` of stored tensors read (only the used rows of an embedding), `flops` of
    products with stored tensors or tensors computed from them alone (2 per multiply-add), and `peak`, the largest number of bytes
    of operator results alive at once.

    A stored tensor is counted every time it is read. Workspaces inside operators are not included."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.stored = {t.untyped_storage()._cdata for t in held(module)}
        self.weight_bytes = self.flops = self.live = self.peak = 0
        self.known: set[int] = set()
        self.made: set[int] = set()  # results that depend on stored tensors alone, such as dequantised weights

    def restart(self) -> None:
        """Reset the counts; tensors alive stay counted in the peak."""
        self.weight_bytes = self.flops = 0
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        read = [t for t in given if t.untyped_storage()._cdata in self.stored]
        weights = len(read) + sum(t.untyped_storage()._cdata in self.made for t in given)
        if weights and func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        if read and not any(t.untyped_storage()._cdata in self.stored for t in results):  # not a view of a weight
            rows = func.overloadpacket is torch.ops.aten.embedding
            self.weight_bytes += sum(t.nbytes for t in (results if rows else read))
        for t in results:
            self._hold(t.untyped_storage())
            if weights and weights == len(given) and t.untyped_storage()._cdata not in self.stored:
                self.made.add(t.untyped_storage()._cdata)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.stored or key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.made.discard(key)
        self.live -= size


def weight_bytes(module: nn.Module) -> int:
    """Bytes of what a module holds; shared tensors are counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held(module)}.values())


def held(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what kernels read in their place once they were used."""
    planes = (one.planes for one in module.modules() if isinstance(one, RoundedLinear) and one.planes)
    signs = (one.held() for one in module.modules() if isinstance(one, RotatedLinear))
    used = [*(t for found in planes for t in found.tensors()), *(t for found in signs for t in found)]
    return [*module.parameters(), *module.buffers(), *used]


if PRODUCT is not None:

    @register_flop_formula(PRODUCT)
    def _flops_of_kernel(x: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
        """Of a product with one plane; shapes (tokens, in) and (tokens, out)."""
        return 2 * x[0] * x[1] * out_shape[1]


class Generation:
    """A model that processes a prompt (batch, length) and decodes `tokens` (batch, steps + 1) with its cache, like `generate`."""

    def __init__(self, model: Any, prompt: Tensor, tokens: Tensor):
        self.model, self.prompt, self.tokens, self.cache = model, prompt, tokens, None

    def prefill(self) -> None:
        """Process the prompt, with logits of the last position only."""
        self.cache = None  # frees its memory before the next one is filled
        self.cache = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step(self, index: int) -> None:
        self.model(input_ids=self.tokens[:, index : index + 1], past_key_values=self.cache, use_cache=True)

    def steps(self) -> None:
        for index in range(1, self.tokens.shape[1]):
            self.step(index)

    def slot(self, clock: Clock, calls: int) -> dict[str, float]:
        """Seconds per prompt and per decoding step; the first prompt and the first step are not timed."""
        seconds = {"prefill": timed(self.prefill, clock, calls)}
        self.step(0)
        seconds["decode"] = clock(self.steps) / (self.tokens.shape[1] - 1)
        self.cache = None
        return seconds

    def resources(self, bandwidth: float) -> dict[str, Resources]:
        """Per phase: `resident_bytes` of the weights as they are held after use, `peak_bytes` (weights, cache and activations),
        per token `flops` and `weight_bytes` read, and `floor_seconds`, in which `bandwidth` (bytes per second) reads those of
        all tokens."""
        cuda = self.prompt.is_cuda
        found: dict[str, Resources] = {}
        phases = (("prefill", self.prefill, self.prompt.numel()), ("decode", self._first, len(self.prompt)))
        before = torch.cuda.memory_allocated() if cuda else 0
        self.prefill()
        self.step(0)  # kernels prepare the numbers of a matrix when they are first used
        with Tally(self.model) as tally:
            for phase, call, tokens in phases:
                tally.restart()
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                call()
                peak = torch.cuda.max_memory_allocated() - before if cuda else tally.peak
                held = weight_bytes(self.model)
                found[phase] = {
                    "resident_bytes": held,
                    "peak_bytes": held + peak,
                    "flops": tally.flops / tokens,
                    "weight_bytes": tally.weight_bytes / tokens,
                    "floor_seconds": tally.weight_bytes / bandwidth,
                }
        self.cache = None
        return found

    def _first(self) -> None:
        self.step(0)


@torch.no_grad()
def evaluate_latency(dense: Any, model: Any | None, spec: specs.Timing, device: str, clock: Clock | None = None) -> Times:
    """Prefill and decoding of `model` (None: only the dense model) compared with the dense one, for every batch size and prompt
    length of `spec` (batches, prompts, decode, repeats, warm_up): {"cases": [...], "machine": {...}}.

    Raises InputError if the model has too few positions.
    """
    clock = clock or clock_of(device)
    speed = bandwidth(device, clock)
    config = dense.config.get_text_config()
    longest, held = max(spec["prompts"]) + spec["decode"] + 1, getattr(config, "max_position_embeddings", None)
    if held and longest > held:
        raise InputError(
            f"prompts of {max(spec['prompts'])} tokens and {spec['decode']} + 1 new ones exceed the {held} positions of the "
            "model; lower `prompts` or `decode` of the evaluation"
        )
    subjects = {"dense": dense, "control": dense, **({} if model is None else {"compressed": model})}
    cases: list[Case] = []
    grid = [(batch, length) for batch in spec["batches"] for length in spec["prompts"]]
    for batch, length in every(grid, "batch sizes and prompts"):
        generator = torch.Generator().manual_seed(0)
        shape = (batch, length + spec["decode"] + 1)
        ids = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
        runs = {name: Generation(own, ids[:, :length], ids[:, length:]) for name, own in subjects.items()}
        calls = calls_of({name: run.prefill for name, run in runs.items()}, clock, spec["warm_up"])
        resources = {name: run.resources(speed) for name, run in runs.items() if name != "control"}
        seconds = interleaved({name: partial(run.slot, clock, calls) for name, run in runs.items()}, spec["repeats"])
        for phase, tokens in (("prefill", batch * length), ("decode", batch)):
            of_phase = {name: values[phase] for name, values in seconds.items()}
            own = {name: of[phase] for name, of in resources.items()}
            found = compared(of_phase, own, tokens)
            case: Case = {"phase": phase, "batch": batch, "prompt": length, "dense": found["dense"], "control": found["control"]}
            if "compressed" in found:
                case["compressed"] = found["compressed"]
            cases.append(case)
    return {"cases": cases, "machine": machine_record(device, dense.config._attn_implementation, speed, ENGINE)}


def compared(seconds: dict[str, list[float]], resources: dict[str, Resources], tokens: int) -> dict[str, Timed]:
    """One record per subject: seconds, tokens per second, resources, and the ratio to dense with its verdict."""
    found: dict[str, Timed] = {}
    control = ratios(seconds["control"], seconds["dense"])
    for name, values in seconds.items():
        found[name] = {
            "seconds": quartiles(values),
            "tokens_per_second": tokens / quartiles(values)["median"],
            **resources.get(name, {}),
        }
        if name != "dense":
            ratio = ratios(values, seconds["dense"])
            found[name] |= {"ratio": ratio, "verdict": latency_verdict(ratio, control)}
        found[name]["per_repeat"] = values
    return found


def bandwidth(device: str, clock: Clock) -> float:
    """Bytes per second at which a product with one vector reads a matrix that no cache holds: the best of several."""
    matrix, vector = torch.zeros(READ >> 14, 1 << 12, device=device), torch.zeros(1 << 12, device=device)
    return READ / min(max(1e-9, timed(lambda: matrix @ vector, clock, 1)) for _ in range(5))


def machine_record(device: str, attention: str, bandwidth: float, engine: str) -> Machine:
    """The hardware and software of the measurement; none of it is a parameter, but all of it affects the numbers."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "clock": "CUDA events" if device == "cuda" else "perf_counter",
        "peak_memory": "torch.cuda.max_memory_allocated" if device == "cuda" else "results of operators alive at once",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "bandwidth": bandwidth,
        "torch": torch.__version__,
        "engine": engine,
        "attention": attention,
    }
