"""A model and its checkpoints in transformers, llama.cpp and vLLM: time and memory beside the dense model in the same engine.

    python tests/benchmarks/engines.py MODEL CHECKPOINT ... [--llama PYTHON] [--vllm PYTHON] [--dtype bfloat16] [--threads 1]
        [--prompt 128] [--decode 32] [--repeats 7] [--csv FILE]

Batch 1. Every line is a checkpoint in an engine: milliseconds of a prompt or of a decoded token, and their ratio to the dense
model's in the same repeat (median and quartiles) with the verdict. `resident_bytes` is what the weights take in transformers, and
all memory of the process in another engine. `PYTHON` is the interpreter that has the engine.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import torch

from winnow.checkpoint.loading import load_model
from winnow.evaluation.engine_latency import engine_latency
from winnow.evaluation.latency import evaluate_latency
from winnow.models.classes import read_config
from winnow.numerics.inference import for_inference


def measured(model: Path, checkpoint: Path, engine: str, python: str | None, given: argparse.Namespace) -> list[dict]:
    spec = {"batches": [1], "prompts": [given.prompt], "decode": given.decode, "repeats": given.repeats, "warm_up": 1}
    spec |= {"dtype": given.dtype, "engine": engine, "python": python}
    if engine == "transformers":
        dense, own = (load_model(path, given.dtype, "cpu") for path in (model, checkpoint))
        found = evaluate_latency(dense, for_inference(own), spec, "cpu")
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = engine_latency(model, checkpoint, spec, read_config(model).get_text_config().vocab_size, Path(folder))
    rows = []
    for case in found["cases"]:
        own, dense, control = case["compressed"], case["dense"], case["control"]
        rows.append(
            {
                "model": model.resolve().name,
                "checkpoint": checkpoint.name,
                "engine": found["machine"]["engine"],
                **{"dtype": given.dtype, "threads": given.threads, "phase": case["phase"], "prompt": given.prompt},
                "milliseconds": 1000 * own["seconds"]["median"],
                "dense_milliseconds": 1000 * dense["seconds"]["median"],
                **{name: own["ratio"][key] for name, key in (("ratio", "median"), ("ratio_q1", "q1"), ("ratio_q3", "q3"))},
                "control_ratio": control["ratio"]["median"],
                "verdict": own["verdict"],
                "resident_bytes": own["resident_bytes"],
                "dense_resident_bytes": dense["resident_bytes"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--llama")
    parser.add_argument("--vllm")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    given, rows = parser.parse_args(), []
    torch.set_num_threads(given.threads)
    engines = {"transformers": None, "llama.cpp": given.llama, "vllm": given.vllm}
    for checkpoint in given.checkpoints:
        for engine, python in engines.items():
            if python or engine == "transformers":
                for row in measured(given.model, checkpoint, engine, python, given):
                    print("  ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
                    rows.append(row)
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    main()
