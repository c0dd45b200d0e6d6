"""Runs in an environment that has vLLM: python run_vllm.py OUT.json DTYPE DIRECTORY... [--compiled]

For every directory: the log-probabilities of random tokens and the greedy continuation, by vLLM and by transformers, which also
computes in float32; or the message of the error with which vLLM refused it.
"""

import gc
import json
import sys
from pathlib import Path

NEW = 8


def by_transformers(path: str, dtype: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    import winnow  # noqa: F401 - registers the loader

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    length = min(100, model.config.max_position_embeddings - NEW)
    ids = torch.randint(3, model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits.float()
        greedy = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)[:, length:]
    found = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return {"ids": ids.tolist(), "expected": found.tolist(), "expected_greedy": greedy.tolist()}


def by_vllm(path: str, dtype: str, ids: list[list[int]], compiled: bool) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"max_model_len": len(ids[0]) + NEW, "max_num_seqs": 4, "skip_tokenizer_init": True, "enforce_eager": not compiled}
    llm = LLM(path, dtype=dtype, **options)
    sampling = SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
    found = [[next(iter(token.values())).logprob for token in one.prompt_logprobs[1:]] for one in out]
    greedy = [list(one.outputs[0].token_ids) for one in out]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"found": found, "greedy": greedy}


def main(out: str, dtype: str, *arguments: str) -> None:
    compiled, results = "--compiled" in arguments, {}
    for path in (argument for argument in arguments if not argument.startswith("--")):
        try:
            results[path] = {"exact": by_transformers(path, "float32")["expected"]} | by_transformers(path, dtype)
            results[path] |= by_vllm(path, dtype, results[path]["ids"], compiled)
        except Exception as error:  # noqa: BLE001 - the test reads the message
            results[path] = {"error": str(error)}
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
