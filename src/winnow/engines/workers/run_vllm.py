"""Times a model directory in vLLM, see `winnow.engines.workers`."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def memory() -> int:
    """Bytes of this process and of those that it started, in memory."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it has ended
            continue
        parents[status.parent.name] = (fields["PPid"].strip(), int(fields.get("VmRSS", "0").split()[0]) << 10)
    found, own = 0, {str(os.getpid())}
    while own:
        found += sum(parents[pid][1] for pid in own if pid in parents)
        own = {pid for pid, (parent, _) in parents.items() if parent in own}
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = json.loads(sys.stdin.readline())
    os.environ.update({**SETTINGS, **os.environ, "OMP_NUM_THREADS": str(job["threads"])})
    import vllm  # reads them

    model = vllm.LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=job["context"],
        max_num_seqs=job["batch"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # every prompt is computed
    )
    plugin = next((f", winnow {own.version}" for own in distributions(name="winnow")), "")
    print(json.dumps({"version": f"vllm {vllm.__version__}{plugin}"}), file=answers, flush=True)

    def seconds(prompts: list[list[int]], new: int) -> float:
        options = vllm.SamplingParams(max_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
        start = time.perf_counter()
        model.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
        return time.perf_counter() - start

    for line in sys.stdin:
        request = json.loads(line)
        prefill = seconds(request["prompts"], 1)
        decode = (seconds(request["prompts"], request["new"] + 1) - prefill) / request["new"]
        print(json.dumps({"prefill": prefill, "decode": decode, "memory": memory()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
