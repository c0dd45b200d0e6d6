"""How fast rounded models run beside the dense one on a CPU: one step of decoding at batch 1, and a prompt.

    python tests/benchmarks/decoding.py [--models block whole] [--keeps 0.6 0.4 0.25] [--threads 1 2] [--dtypes bfloat16 float32]
        [--repeats 11] [--prompt 512] [--csv FILE]

Two models with random weights: a block of Llama-3.2-1B's shape (2048 x 8192, 32 heads, 8 of keys; a vocabulary of 1,024, so that
the block is what is timed) and a whole model of 110 million numbers. Codes are random too, since times do not depend on them:
every matrix has as many bits (2, 3, 4, 5, 6 or 8, groups of 128) as the bytes that are kept allow, one after the other. `before`
multiplies whole matrices out at every call; `now` is the model as `winnow.for_inference` prepares it. All are timed in turns; a
ratio is the time over the dense model's in the same repeat, the floor is the time in which the weights are read once at the
measured bandwidth. Memory is that of the weights held after use. The CSV file has a row for every phase and share of the bytes.
"""

import argparse
import contextlib
import copy
import csv
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import winnow
from winnow.evaluation.latency import Generation, bandwidth, clock_of, interleaved, latency_verdict, quartiles, ratios
from winnow.numerics import modules

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS = {
    "block": {"vocab_size": 1024, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, **HEADS},
    "whole": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 9}
    | {"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
}
BITS, GROUP = (2, 3, 4, 5, 6, 8), 128
DECODED = 8


@contextlib.contextmanager
def before():
    """Whole matrices are multiplied out at every call."""
    with mock.patch.object(modules, "applies", return_value=False), mock.patch.object(modules, "AT_ONCE", 1 << 40):
        yield


def rounded(dense: LlamaForCausalLM, keep: float) -> LlamaForCausalLM:
    """The model with rounded matrices in its blocks that take at most `keep` of the bytes in 16 bits."""
    model = copy.deepcopy(dense)
    allowed = 0.0
    for parent in [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                rows, columns = linear.weight.shape
                allowed += 2 * keep * rows * columns
                bits = max(b for b in BITS if rows * columns * (b + 16 / GROUP) / 8 <= allowed)
                allowed -= rows * columns * (bits + 16 / GROUP) / 8
                made = modules.RoundedLinear(columns, rows, bits, GROUP, False)
                made.steps.random_(-128, 128) if bits == 8 else made.steps.random_(0, 256)
                made.scale.copy_((torch.rand(rows, columns // GROUP) / 100 / 2**bits).half().view(torch.int16))
                setattr(parent, name, made)
    return model


def slot(run: Generation, clock, context) -> dict[str, float]:
    with context():
        return run.slot(clock, 1)


@torch.no_grad()
def measure(title: str, keeps: list[float], dtype: str, threads: int, repeats: int, prompt: int) -> list[dict]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**MODELS[title], max_position_embeddings=2048)).to(getattr(torch, dtype)).eval()
    ids = torch.randint(0, dense.config.vocab_size, (1, prompt + DECODED + 1))
    compressed = {keep: rounded(dense, keep) for keep in keeps}
    torch.set_num_threads(threads)
    clock = clock_of("cpu")
    speed, runs = bandwidth("cpu", clock), {}
    for name, model, context in (
        ("dense", dense, contextlib.nullcontext),
        ("control", dense, contextlib.nullcontext),
        *((f"{keep} before", copy.deepcopy(model), before) for keep, model in compressed.items()),
        *((f"{keep} now", winnow.for_inference(model), contextlib.nullcontext) for keep, model in compressed.items()),
    ):
        runs[name] = (Generation(model, ids[:, :prompt], ids[:, prompt:]), context)
    resources = {}
    for name, (run, context) in runs.items():
        with context():
            resources[name] = run.resources(speed)
    seconds = interleaved({name: partial(slot, run, clock, context) for name, (run, context) in runs.items()}, repeats)
    rows = []
    for phase in ("decode", "prefill"):
        reference = seconds["dense"][phase]
        control = ratios(seconds["control"][phase], reference)
        for name in runs:
            own, base = resources[name][phase], resources["dense"][phase]
            ratio = ratios(seconds[name][phase], reference)
            rows.append(
                {
                    **{"model": title, "dtype": dtype, "threads": threads, "phase": phase, "form": name},
                    **{"milliseconds": 1000 * quartiles(seconds[name][phase])["median"], "ratio": ratio["median"]},
                    **{"ratio_q1": ratio["q1"], "ratio_q3": ratio["q3"], "verdict": latency_verdict(ratio, control)},
                    "floor_milliseconds": 1000 * own["floor_seconds"],
                    "bytes_read": own["weight_bytes"] / base["weight_bytes"],
                    "resident": own["resident_bytes"] / base["resident_bytes"],
                }
            )
    return rows


def table(rows: list[dict]) -> list[dict]:
    """A row for every phase and every share of the bytes: times over the dense model's, bytes read and memory."""
    keys, found = ("model", "dtype", "threads", "phase"), []
    for row in (row for row in rows if row["form"].endswith(" now")):
        case, (keep, _) = {key: row[key] for key in keys}, row["form"].split()
        others = {r["form"]: r for r in rows if {key: r[key] for key in keys} == case}
        found.append(
            {
                **{**case, "kept": keep, "dense, ms": f"{float(others['dense']['milliseconds']):.3g}"},
                "its floor, ms": f"{float(others['dense']['floor_milliseconds']):.3g}",
                "control": f"{float(others['control']['ratio']):.2f}",
                "before": f"{float(others[f'{keep} before']['ratio']):.2f}",
                **{
                    "now": f"{float(row['ratio']):.2f}",
                    "quartiles": f"{float(row['ratio_q1']):.2f} to {float(row['ratio_q3']):.2f}",
                },
                **{"bytes read": f"{float(row['bytes_read']):.2f}", "memory": f"{float(row['resident']):.2f}"},
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--keeps", type=float, nargs="*", default=[0.6, 0.4, 0.25])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--csv", type=Path)
    given, rows = parser.parse_args(), []
    for title in given.models:
        for dtype in given.dtypes:
            for threads in given.threads:
                for row in measure(title, given.keeps, dtype, threads, given.repeats, given.prompt):
                    print("  ".join(f"{v:8.3f}" if isinstance(v, float) else f"{v!s:<12}" for v in row.values()), flush=True)
                    rows.append(row)
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(table(rows)[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table(rows))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    main()
