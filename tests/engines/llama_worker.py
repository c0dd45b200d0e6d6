"""Runs in an environment with llama-cpp-python, without winnow: `python llama_worker.py JOB.json OUT.npz`.

A job names a GGUF file and token windows (a .npy file of integers), and what to measure; the result has arrays. Memory is that of
this process, so every measurement is a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from llama_cpp import LLAMA_FTYPE_MOSTLY_Q8_0, Llama, llama_model_quantize, llama_model_quantize_default_params


def memory() -> dict[str, int]:
    """Bytes of this process in memory: all of them, and those that no file backs."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {"resident": int(lines["Rss"].split()[0]) << 10, "anonymous": int(lines["Anonymous"].split()[0]) << 10}


def loaded(job: dict, context: int, logits: bool) -> Llama:
    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), context)
    return Llama(job["file"], n_threads=1, n_threads_batch=1, logits_all=logits, verbose=False, **sizes, **job.get("options", {}))


def losses(model: Llama, windows: np.ndarray) -> np.ndarray:
    """(windows,) nats: the sum over the tokens of a window after the first."""
    found = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = model.scores[: len(window) - 1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        normal = np.log(np.exp(logits).sum(1))
        found.append((normal - logits[np.arange(len(window) - 1), window[1:]]).sum())
    return np.array(found)


def speed(model: Llama, prompt: list[int], new: int) -> dict[str, np.ndarray]:
    """Tokens per second of this process's processor time, for a prompt and for tokens one by one after it. With one thread that
    is the time on an idle machine; on a busy one the clock would count what others do."""
    model.eval(prompt)  # reads the file
    model.reset()
    start = time.process_time()
    model.eval(prompt)
    middle = time.process_time()
    for token in prompt[:new]:
        model.eval([token])
    end = time.process_time()
    return {"prompt": np.array(len(prompt) / (middle - start)), "decode": np.array(new / (end - middle))}


def quantize(source: str, target: str) -> None:
    """llama.cpp's own Q8_0 of a file."""
    params = llama_model_quantize_default_params()
    params.ftype, params.nthread = LLAMA_FTYPE_MOSTLY_Q8_0, 1
    assert llama_model_quantize(source.encode(), target.encode(), params) == 0


def main() -> None:
    found: dict[str, np.ndarray] = {}
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["measure"] == "quantize":
        quantize(job["file"], job["target"])
        np.savez(sys.argv[2])
        return
    windows = np.load(job["windows"])
    model = loaded(job, windows.shape[1] + job.get("new", 0), job["measure"] != "speed")
    if job["measure"] == "losses":
        found["losses"] = losses(model, windows)
    elif job["measure"] == "logits":
        model.eval(windows[0].tolist())
        found["logits"] = model.scores[: windows.shape[1]].copy()
    elif job["measure"] == "tokens":
        for i, text in enumerate(job["texts"]):
            found[f"text{i}"] = np.array(model.tokenize(text.encode(), add_bos=True, special=False), np.int64)
    else:
        found |= speed(model, windows[0].tolist(), job["new"])
        found |= {name: np.array(value) for name, value in memory().items()}
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
