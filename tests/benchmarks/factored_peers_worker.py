"""Compresses a model by clones of the repositories of LQER, SVD-LLM and SPQ, which need not be importable beside winnow.

    <python with their requirements> tests/benchmarks/factored_peers_worker.py SPEC.json

The keys of a SPEC: `model`, a directory; `windows`, a .npy of token ids (windows, length) for calibration; `recipe`, `code` and
`setting` as in `factored_peers.py`; `repository`, the clone; `seed`; `out`, a directory in which the model is saved with the
matrices of its blocks multiplied out, as float32, and `report.json`: the commit, seconds of one core, and the stored bits of the
blocks. Works on models of the family Llama, on a CPU.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from quantisers_worker import dense, matrices

BATCH = 16  # windows; LQER's statistics depend on it: the largest of the means of batches


def grouped(weight, bits, group):
    """`weight` to nearest, in integers with scales of float16 by the largest number of a group of a row, as winnow's."""
    found = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part, steps = weight[:, start : start + group], 2 ** (bits - 1) - 1
        scale = (part.abs().amax(1, keepdim=True) / steps).half().float().clamp(min=1e-7)
        found[:, start : start + group] = (part / scale).round().clamp(-steps, steps) * scale
    return found


def lqer(spec, ids):
    """L2QER with the class that approximates a matrix. `code` "authors": blocks of one exponent, as published; "authors, numbers
    of winnow": integers with a scale for every group, and factors of 16 bits."""
    from lqer.approximate.lqer_act import WeightApproximatorLqerAct
    from lqer.quantize import get_quantizer
    from lqer.statistic_profiler import register_scale_hooks

    model, given, own = dense(spec["model"]), spec["setting"], spec["code"] != "authors"
    profiler = register_scale_hooks(model)
    with torch.no_grad():
        for batch in ids.split(BATCH):
            model(batch)
    scales, stored = profiler.get_scale_dict(), 0
    block = {"exponent_width": 8, "exponent_bias": None, "skip_first_dim": False}
    blocks = partial(get_quantizer("block_fp"), width=given["bits"], block_size=[1, given["block"]], **block)
    factors = partial(get_quantizer("block_fp"), width=8, block_size=[1, 16], **block)
    if own:
        blocks, factors = partial(grouped, bits=given["bits"], group=given["group"]), get_quantizer("passthrough")
    for name, module in matrices(model).items():
        one = WeightApproximatorLqerAct(name, module.weight.data, given["rank"], blocks, factors, factors)
        one.initialize_scale(scales[f"{name}.scale"])
        one.approximate()
        module.weight.data = one.approximated_W()
        (m, n), rank = module.weight.shape, given["rank"]
        if own:
            stored += m * n * given["bits"] + 16 * m * -(-n // given["group"]) + 16 * rank * (m + n)
        else:  # an exponent of 8 bits for every block
            stored += m * n * given["bits"] + 8 * m * -(-n // given["block"])
            stored += 8 * (rank * (m + n) + n * -(-rank // 16) + rank * -(-m // 16))
    return model, stored


def svd_llm_gptq(spec, ids):
    """Whitening by the Cholesky factor, truncation, and GPTQ of both factors in the order of the layers, with activation order
    and rows as groups."""
    import quant_llama
    import SVDLLM

    torch.cuda.synchronize = lambda *_: None  # fails without an accelerator
    model, given = dense(spec["model"]), spec["setting"]
    model.set_attn_implementation("eager")  # with a mask for every call
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    profile = SVDLLM.profle_svdllm("llama", copy.deepcopy(model), rows, "cpu")
    factored = copy.deepcopy(model)
    SVDLLM.whitening("llama", factored, profile, given["ratio"], "cpu")
    pairs, stored = {}, 0
    for name in list(matrices(model)):
        place, _, role = name.rpartition(".")
        block, base, pairs[name] = model.get_submodule(place), role.removesuffix("proj"), []
        for side in ("u", "v"):
            weight = factored.get_submodule(f"{place}.{base}{side}_proj").weight.data
            part = torch.nn.Linear(*reversed(weight.shape), bias=False)
            part.weight.data = weight
            block.add_module(f"{base}{side}_proj", part)
            pairs[name].append(part)
            stored += weight.numel() * given["bits"] + len(weight) * (16 + given["bits"])
        delattr(block, role)
        block.__dict__[role] = lambda x, pair=pairs[name]: pair[0](pair[1](x))  # by which the blocks of transformers call it

    def positions(_, args, kwargs):  # which the repository does not give to a layer: at its time, attention computed them
        if kwargs.get("position_embeddings") is None:
            kwargs["position_embeddings"] = model.model.rotary_emb(kwargs["hidden_states"], kwargs["position_ids"])
        return args, kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(positions, with_kwargs=True)
    model.seqlen = ids.shape[1]
    order = {"true_sequential": True, "act_order": True, "static_groups": False, "groupsize": -1, "percdamp": 0.01}
    if spec["code"] == "authors":
        quant_llama.args = argparse.Namespace(nsamples=len(ids), wbits=given["bits"], sym=False, **order)
        quant_llama.llama_sequential(model, [(row[None],) for row in ids], "cpu")
    else:  # without rounding
        stored = sum(16 * part.weight.numel() for pair in pairs.values() for part in pair)
    found = dense(spec["model"])
    for name, module in matrices(found).items():
        left, right = pairs[name]
        module.weight.data = left.weight.data @ right.weight.data
    return found, stored


def spq(spec, ids):
    """SVD of attention by its variance, pruned neurons, and 8 bits; without the training afterwards. With `rank` or `neurons` in
    place of `variance` and `pruned`: these shares in every layer, and only attention or only the FFN is compressed."""
    from methods import linear_quant, pruning, svd

    model, given, layers = dense(spec["model"]), spec["setting"], range(len(dense(spec["model"]).model.layers))
    names = svd.svd_layers_name_factory("attention")("llama", len(layers))
    chosen = dict.fromkeys(names, 1 - given["rank"]) if "rank" in given else {}
    if "variance" in given:
        chosen = svd.compute_cumsum_rank_ratios(model, names, given["variance"])
    model, kept = svd.apply_svd_compression(model, chosen, "llama"), {}
    if "rank" not in given:
        places = pruning.prune_layers_name_factory("mlp")("llama", len(layers))
        rows = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids.split(BATCH)]
        means = pruning.collect_activation_stats(model, places, rows, len(rows), "l1", "cpu")
        shares = 1 - given.get("neurons", 1.0)
        if "pruned" in given:
            shares = pruning.get_per_layer_prune_ratios(means, len(layers), "mlp", "llama", given["pruned"], 0.0)
        ups = [model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in layers]
        before = [up.weight.data.clone() for up in ups]
        pruning.prune_model_by_activation(model, means, shares, "mlp", "llama", len(layers), "cpu")
        kept = {i: (ups[i].weight[:, None] == before[i]).all(2).nonzero()[:, 1] for i in layers}
    if given["scales"] == "rows":
        model = linear_quant.replace_with_real_int8_per_channel(model)
    else:
        model = linear_quant.replace_with_hybrid_quant_linear(model, *linear_quant.choose_quantization_mode_name(model))
    found, stored = dense(spec["model"]), 0
    for name, module in matrices(found).items():
        if ("rank" in given and ".mlp." in name) or ("neurons" in given and ".self_attn." in name):
            stored += 16 * module.weight.numel()
            continue
        own = model.get_submodule(name)
        parts = list(own) if isinstance(own, torch.nn.Sequential) else [own]
        stored += sum(8 * part.quantized_weight.numel() + 16 * part.scale.numel() for part in parts)
        factors = [part.quantized_weight.float() * part.scale.reshape(-1, 1) for part in parts]
        whole = factors[1] @ factors[0] if factors[1:] else factors[0]
        if ".mlp." in name:
            neurons = kept[int(name.split(".")[2])]
            module.weight.data.zero_()
            module.weight.data[(slice(None), neurons) if "down" in name else neurons] = whole
        else:
            module.weight.data = whole
    return found, stored


RECIPES = {"lqer": lqer, "svd_llm_gptq": svd_llm_gptq, "spq": spq}
SOURCES = {"lqer": "src", "svd_llm_gptq": "", "spq": ""}  # folders of the repositories with the code


def main(path):
    torch.set_num_threads(1)
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.manual_seed(spec["seed"])
    sys.path.insert(0, str(Path(spec["repository"]) / SOURCES[spec["recipe"]]))
    ids, out = torch.from_numpy(np.load(spec["windows"])).long(), Path(spec["out"])
    began = time.process_time()
    with torch.no_grad():
        model, bits = RECIPES[spec["recipe"]](spec, ids)
    commit = ["git", "-C", spec["repository"], "rev-parse", "--short=10", "HEAD"]
    version = subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip()
    model.save_pretrained(out)
    report = {"seconds": time.process_time() - began, "version": version, "bits": bits}
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
