"""Rounds the matrices of the blocks of a model with other packages, which need not be installed beside winnow.

    <python with the packages> tests/benchmarks/quantisers_worker.py SPEC.json ...

The keys of a SPEC: `model`, a directory; `windows`, a .npy of token ids (windows, length) for calibration; `quantiser`, `bits`,
`group`, `seed`; `out`, a directory in which the model is saved with its matrices dequantised, as float32, and `report.json`: the
version of the package, seconds of one core for the rounding, how many groups every matrix has, and the bits of a zero point.
`SAVED SPEC.json` is printed after each.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ITERATIONS = 200  # of AutoRound, as by default


def dense(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def matrices(model):
    """{name: module} of the matrices of the blocks."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}


def hqq(spec, ids):
    """Half-quadratic quantisation along the inputs; scales and zero points are float16."""
    from hqq.core.quantize import Quantizer
    from transformers.pytorch_utils import Conv1D

    model, groups = dense(spec["model"]), {}
    options = {"nbits": spec["bits"], "group_size": spec["group"], "axis": 1, "device": "cpu", "bitpack": False}
    for name, module in matrices(model).items():
        turned = isinstance(module, Conv1D)
        weight = module.weight.data.T.contiguous() if turned else module.weight.data
        codes, meta = Quantizer.quantize(weight, **options)
        scale, zero = (meta[key].half().float() for key in ("scale", "zero"))
        found = ((codes - zero) * scale).reshape(weight.shape)
        module.weight.data, groups[name] = found.T.contiguous() if turned else found, scale.numel()
    return model, groups, 16


def autoround(spec, ids):
    """AutoRound with integer zero points."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True), dense(spec["model"])
    options = {"bits": spec["bits"], "group_size": spec["group"], "sym": False, "iters": ITERATIONS, "seed": spec["seed"]}
    options |= {"nsamples": len(ids), "seqlen": ids.shape[1], "batch_size": 8, "dataset": [row[None] for row in ids]}
    here = {"device_map": "cpu", "amp": False, "enable_torch_compile": False}
    model, _ = AutoRound(model, tokenizer=tokenizer, scheme="W4A16", **options, **here).quantize()
    if left := [name for name, module in matrices(model).items() if not hasattr(module, "scale")]:
        raise SystemExit(f"AutoRound leaves {left[0]} and {len(left) - 1} more as they are: a width is no multiple of 32")
    return model, {name: module.scale.numel() for name, module in matrices(model).items()}, spec["bits"]


def rtn(spec, ids):
    """To nearest, scales and zero points as of `gptq`."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return compressor(spec, ids, QuantizationModifier)


def gptq(spec, ids):
    """GPTQ with activation order and static groups; scales and zero points that reach the ends of every group."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return compressor(spec, ids, GPTQModifier, dampening_frac=0.01, actorder="static")


def awq(spec, ids):
    """AWQ as by default: norms and matrices before take the inverse of the scales, where the package knows that they can."""
    from llmcompressor.modifiers.awq import AWQModifier

    return compressor(spec, ids, AWQModifier, **({"mappings": mappings()} if "opt" in spec["family"] else {}))


def mappings():
    """Those of OPT, for which the package has none."""
    from llmcompressor.modifiers.awq import AWQMapping

    inputs = ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
    pairs = {"re:.*self_attn_layer_norm$": inputs, "re:.*v_proj$": ["re:.*out_proj$"]}
    pairs |= {"re:.*final_layer_norm$": ["re:.*fc1$"], "re:.*fc1$": ["re:.*fc2$"]}
    return [AWQMapping(before, after) for before, after in pairs.items()]


def dividing(columns, group):
    """The smallest group of at least `group` that divides a row, which llm-compressor needs."""
    return next(width for width in range(min(group, columns), columns + 1) if columns % width == 0)


def compressor(spec, ids, modifier, **options):
    """A modifier of llm-compressor on a model."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoTokenizer

    IntermediatesCache.pin_memory = lambda *_, **__: None  # which fails without an accelerator
    tokenizer, model = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True), dense(spec["model"])
    widths, weights = {}, {"num_bits": spec["bits"], "type": "int", "symmetric": False, "strategy": "group"}
    for name, module in matrices(model).items():
        widths.setdefault(dividing(module.weight.shape[1], spec["group"]), []).append(name)
    config = {f"group_{n}": {"targets": names, "weights": {**weights, "group_size": n}} for n, names in widths.items()}
    recipe = modifier(config_groups=config, ignore=["lm_head"], **options)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    given = {"max_seq_length": ids.shape[1], "num_calibration_samples": len(ids), "batch_size": 16, "tokenizer": tokenizer}
    oneshot(model=model, dataset=Dataset.from_dict(rows), recipe=recipe, **given)
    groups = {}
    for name, module in matrices(model).items():
        scale, zero = module.weight_scale.data, module.weight_zero_point.data
        codes = quantize(module.weight.data, scale, zero, module.quantization_scheme.weights)
        steps, points = (part.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1) for part in (scale.half(), zero))
        module.weight.data, groups[name] = (codes - points) * steps, scale.numel()
    return model, groups, spec["bits"]


PACKAGES = {"rtn": rtn, "hqq": hqq, "gptq": gptq, "awq": awq, "autoround": autoround}
DISTRIBUTIONS = {"rtn": "llmcompressor", "hqq": "hqq", "gptq": "llmcompressor", "awq": "llmcompressor", "autoround": "auto-round"}


def main(path):
    torch.set_num_threads(1)
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    spec["family"] = json.loads((Path(spec["model"]) / "config.json").read_text(encoding="utf-8"))["model_type"]
    torch.manual_seed(spec["seed"])
    ids, out = torch.from_numpy(np.load(spec["windows"])).long(), Path(spec["out"])
    began = time.process_time()
    model, groups, zero_bits = PACKAGES[spec["quantiser"]](spec, ids)
    report = {"seconds": time.process_time() - began, "groups": groups, "zero_bits": zero_bits}
    report["version"] = importlib.metadata.version(DISTRIBUTIONS[spec["quantiser"]])
    fresh = dense(spec["model"])  # what is saved are its tensors, not what a package has put beside them
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(own[name])
    fresh.save_pretrained(out)
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    print("SAVED", path, flush=True)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        main(given)
