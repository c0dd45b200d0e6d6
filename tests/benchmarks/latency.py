"""How fast every form is beside the dense one at equal bytes, and what the fused paths of winnow/numerics/modules.py save.

    python tests/benchmarks/latency.py [--keeps 0.8 0.5] [--tokens 1 8 32 512] [--repeats 31] [--threads 1] [--dtype float32]

Two blocks with random weights: the FFN of Llama-3.2-1B (2048 x 8192, SiLU gate) and that of the demo model (128 x 352). Every
line is one form: time over the dense block's in the same repeat, median and quartiles, and the verdict; then the same for
`fused` over `plain` (the forward passes without what modules.py fuses). Tokens 1, 8 and 32 are steps of decoding with so many
sequences, 512 is a prompt. Ratios only: the times themselves say more about the machine than about the forms.
"""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from winnow.evaluation.latency import calls_of, clock_of, interleaved, latency_verdict, ratios, timed, weight_bytes
from winnow.models.architectures import SITES, Matrix
from winnow.numerics import modules
from winnow.structures.base import STRUCTURES

BLOCKS = {"Llama-3.2-1B FFN": (2048, 8192), "demo FFN": (128, 352)}
FORMS = {
    "low_rank": {"kind": "low_rank"},
    "gauge_fixed": {"kind": "gauge_fixed"},
    "shared_basis": {"kind": "shared_basis"},
    "split": {"kind": "split"},
    "cluster, columns": {"kind": "cluster"},
    "cluster, neurons": {"kind": "cluster", "axis": "neurons"},
}


class Block(nn.Module):
    """down(SiLU(gate x) * up x)."""

    def __init__(self, d: int, f: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj, self.act_fn = nn.Linear(f, d, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def fitted(structure, group: list[Matrix], size: int) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of a fit: times do not depend on values."""
    rows, inputs = sum(m.shape[0] for m in group), group[0].shape[1]
    kind = structure.kind()
    if kind == "split":
        heavy, found = structure._heavy(group), {}
        for m in group:
            (m_out, m_in), last = m.shape, m is group[-1]
            exact, light = ((m_out, heavy), (m_out, m_in - heavy)) if last else ((heavy, m_in), (m_out - heavy, m_in))
            found[f"{m.role}.exact"] = torch.randn(exact)
            found |= {f"{m.role}.left": torch.randn(light[0], size), f"{m.role}.right": torch.randn(size, light[1])}
        return found
    if kind == "cluster":
        on_rows = structure.on_rows(group[0])
        channels, clusters = structure.limit(group), structure.options.clusters
        sizes = torch.tensor([len(part) for part in torch.arange(channels).tensor_split(clusters)])
        found = {"order": torch.randperm(channels), "sizes": sizes}
        for cluster, count in enumerate(sizes.tolist()):
            m, n = (count, inputs) if on_rows else (rows, count)
            found |= {f"{cluster}.left": torch.randn(m, min(m, n)), f"{cluster}.right": torch.randn(min(m, n), n)}
        return found
    return {"left": torch.randn(rows, size), "right": torch.randn(size, inputs)}


def compressed(spec: dict, d: int, f: int, keep: float) -> Block:
    """The block in a form that stores at most `keep` of its bytes: the largest size that does, in every group."""
    shapes = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    matrices = [Matrix(0, role, role, SITES[role], shape, False, False, "act_fn") for role, shape in shapes.items()]
    structure, block, parts, state = STRUCTURES.build(spec), Block(d, f), {}, {}
    for group in structure.groups(matrices):
        allowed = keep * sum(m.shape[0] * m.shape[1] for m in group)
        known = fitted(structure, group, 1)  # cluster sizes, which its numbers depend on

        def stored(size: int, structure=structure, group=group, known=known) -> float:
            return structure.numbers(group, size, known) + structure.index_bytes(group, size) / 4

        low, high = 1, structure.limit(group)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if stored(middle) <= allowed else (low, middle - 1)
        parts |= structure.stored(group, fitted(structure, group, low), low)
    for name, part in parts.items():
        setattr(block, name, structure.module(part.layout, block.get_submodule(name)))
        state |= {f"{name}.{key}": tensor for key, tensor in part.tensors.items()}
    tied = {key: owner for name, part in parts.items() for key, owner in structure.share(block, name, part.layout).items()}
    state |= {key: state[owner] for key, owner in tied.items()}
    scaled = {key: t / t.shape[-1] ** 0.5 if t.is_floating_point() and t.numel() else t for key, t in state.items()}
    block.load_state_dict(scaled, strict=True)
    return block


@contextlib.contextmanager
def plain():
    """The forward passes without what modules.py fuses."""
    with (
        mock.patch.object(modules, "reordered", lambda x, order: x.index_select(-1, order.int())),
        mock.patch.object(modules.SharedLinear, "forward", nn.Linear.forward),
    ):
        yield


def slot(block: Block, x: torch.Tensor, clock, calls: int, context) -> dict[str, float]:
    with context():
        return {"forward": timed(lambda: block(x), clock, calls)}


def line(name: str, ratio: dict[str, float], words: str = "") -> str:
    return f"  {name:24s} {ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}] {words}"


@torch.no_grad()
def measure(title: str, shape: tuple[int, int], keep: float, tokens: int, repeats: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, clock = Block(*shape).to(dtype), clock_of("cpu")
    blocks = {name: compressed(spec, *shape, keep).to(dtype) for name, spec in FORMS.items()}
    x = torch.randn(*((tokens, 1) if tokens < 100 else (1, tokens)), shape[0], dtype=dtype)
    for block in blocks.values():
        with plain():
            reference = block(x)
        torch.testing.assert_close(block(x), reference)
    calls = calls_of({"dense": lambda: dense(x)}, clock, 2)
    slots = {name: partial(slot, dense, x, clock, calls, contextlib.nullcontext) for name in ("dense", "control")}
    for name, block in blocks.items():
        slots[name] = partial(slot, block, x, clock, calls, contextlib.nullcontext)
        slots[f"{name}, plain"] = partial(slot, block, x, clock, calls, plain)
    seconds = {name: found["forward"] for name, found in interleaved(slots, repeats).items()}
    control = ratios(seconds["control"], seconds["dense"])
    what = f"{tokens} sequences, 1 token" if tokens < 100 else f"a prompt of {tokens} tokens"
    print(f"{title}, keep {keep}, {what}: time over dense [quartiles]; fused over plain")
    print(line("dense against dense", control, latency_verdict(control, control)))
    for name, block in blocks.items():
        ratio = ratios(seconds[name], seconds["dense"])
        share = weight_bytes(block) / weight_bytes(dense)
        fused = line("", ratios(seconds[name], seconds[f"{name}, plain"])).strip()
        print(
            f"{line(name, ratio, f'{latency_verdict(ratio, control):20s}')} bytes {share:.3f}   fused/plain {fused}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="*", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--keeps", type=float, nargs="*", default=[0.8, 0.5])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for title in given.blocks:
        for keep in given.keeps:
            for tokens in given.tokens:
                measure(title, BLOCKS[title], keep, tokens, given.repeats, getattr(torch, given.dtype))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    main()
