"""Times a GGUF file in llama.cpp, see `winnow.engines.workers`."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def memory() -> int:
    """Bytes of this process in memory, pages of the file that it reads included."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    from llama_cpp import Llama

    job = json.loads(sys.stdin.readline())
    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), job["context"])
    threads = dict.fromkeys(("n_threads", "n_threads_batch"), job["threads"])
    model = Llama(job["model"], verbose=False, logits_all=False, **sizes, **threads)
    print(json.dumps({"version": f"llama-cpp-python {version('llama-cpp-python')}"}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        (prompt,) = request["prompts"]
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        middle = time.perf_counter()
        for token in (prompt * request["new"])[: request["new"]]:
            model.eval([token])
        end = time.perf_counter()
        found = {"prefill": middle - start, "decode": (end - middle) / request["new"], "memory": memory()}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
