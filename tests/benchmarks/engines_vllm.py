"""Compressed checkpoints in vLLM beside their dense model: difference from transformers, tokens per second, memory.

<python with vLLM and winnow> tests/benchmarks/engines_vllm.py OUT.csv DTYPE DENSE CHECKPOINT...

Every model is loaded in a process of its own, on one thread, without compilation. `off_vllm` is the root mean square of the
differences of the log-probabilities of 4 x 199 random tokens from those of transformers in float32, and `off_transformers` that
of transformers in DTYPE; `tokens_s` is the decoding of one sequence, the best of three; `anonymous_mb` is the memory of the
process without mapped files, once the model is loaded and has answered, and `over_dense_mb` the difference from the first
model's. MB are 10^6 bytes.
"""

import csv
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SETTINGS |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
LENGTH, NEW = 200, 48


def reference(path: str, dtype: str, ids) -> list[list[float]]:
    """Log-probabilities of the tokens after the first, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    import winnow  # noqa: F401 - registers the loader

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        found = model(ids).logits.float().log_softmax(-1)
    return found[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].tolist()


def anonymous_mb() -> float:
    """Memory of this process in MB, without mapped files and without what the allocator could return."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def measured(path: str, dtype: str, ids) -> dict[str, object]:
    """What vLLM does with a model; in a process that has loaded nothing else."""
    from vllm import LLM, SamplingParams

    options = {"enforce_eager": True, "skip_tokenizer_init": True, "max_num_seqs": 4, "max_model_len": LENGTH + NEW + 8}
    llm = LLM(path, dtype=dtype, **options)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    out = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
    found = [[next(iter(token.values())).logprob for token in one.prompt_logprobs[1:]] for one in out]
    speeds = []
    for _ in range(3):
        begin = time.perf_counter()
        few = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids[0, :8].tolist()}], few, use_tqdm=False)
        speeds.append(NEW / (time.perf_counter() - begin))
    return {"logprobs": found, "tokens_s": max(speeds), "anonymous_mb": anonymous_mb()}


def one(stage: str, path: str, dtype: str) -> None:
    """Prints the result of one process as JSON."""
    import torch

    size = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    ids = torch.randint(3, size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    print("RESULT", json.dumps({"reference": reference, "measured": measured}[stage](path, dtype, ids)), flush=True)
    os._exit(0)  # vLLM's processes end with this one


def process(stage: str, path: str, dtype: str) -> Any:
    """The result of a process of its own. Ends with its messages if it fails."""
    command = [sys.executable, __file__, "--one", stage, path, dtype]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SETTINGS}, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stderr)
    return json.loads(lines[-1].removeprefix("RESULT "))


def off(found: list[list[float]], expected: list[list[float]]) -> float:
    """The root mean square of the differences."""
    squares = [(a - b) ** 2 for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def main(out: str, dtype: str, *paths: str) -> None:
    """Writes and prints a row for every model."""
    rows: list[dict[str, str]] = []
    first = 0.0
    for path in paths:
        expected = process("reference", path, "float32")
        plain, own = process("reference", path, dtype), process("measured", path, dtype)
        size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        memory = own["anonymous_mb"]
        first = first if rows else memory
        numbers = {"file_mb": size / 1e6, "tokens_s": own["tokens_s"], "anonymous_mb": memory, "over_dense_mb": memory - first}
        offs = {"off_vllm": off(own["logprobs"], expected), "off_transformers": off(plain, expected)}
        rows.append({"model": Path(path).name, "dtype": dtype})
        rows[-1] |= {key: f"{value:.2g}" for key, value in offs.items()} | {key: f"{value:.1f}" for key, value in numbers.items()}
        print(rows[-1], flush=True)
    with open(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1] == "--one" else main(*sys.argv[1:])
