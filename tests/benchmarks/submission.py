"""How many jobs a sweep of a model of 1.2e9 weights submits by the profile for SLURM, and what submitting costs.

    python -m tests.benchmarks.submission [--cells 1000] [--rate 5e13] [--start 4.0] [--member 1.2]

Nothing is computed, and no weight is made: the forecast reads shapes. Its times are set against the measured seconds that a
submission holds a node beside its rule's own time (`--start`), and a further member of a group (`--member`), both from
tests/benchmarks/slurm_jobs.py. `--rate` is in floating-point operations per second; without it, this machine's.
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import yaml

from tests.benchmarks.planning import ROOT, snakemake, sweep

BF16 = 2  # bytes
MODEL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 64}
MODEL |= {"vocab_size": 128256, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}  # as Llama-3.2-1B


def write_model(folder: Path) -> None:
    """A directory as of a model of these shapes; its weights are a hole in a file, behind their header."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODEL, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, weight in model.named_parameters():
        begin, end = end, end + BF16 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources" / "models" / "demo" / name, folder / name)


def configuration(cells: int, model: Path) -> dict:
    """The sweep of tests/benchmarks/planning.py, of that model, on as many tokens as WikiText-2 is calibrated and scored with."""
    config = sweep(cells)
    config["models"] = {"demo": {"source": str(model), "dtype": "bfloat16"}}
    config["calibrations"]["c"] |= {"windows": 256, "length": 2048}
    config["evaluations"]["e"] |= {"windows": 141, "length": 2048}
    return config


def groups() -> dict[str, int]:
    """{rule: jobs in a submission} of the profile."""
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    sizes = dict(entry.split("=") for entry in profile.get("group-components", []))
    return {rule: int(sizes.get(name, 1)) for rule, name in (entry.split("=") for entry in profile.get("groups", []))}


def main() -> None:
    from winnow.models.shape import shape_of
    from winnow.planning.config import load
    from winnow.planning.forecast import forecast
    from winnow.planning.plan import Plan
    from winnow.planning.preview import jobs_of
    from winnow.planning.rates import alike, of_this_machine

    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind, value in (("cells", int, 1000), ("rate", float, None), ("start", float, 4.0), ("member", float, 1.2)):
        parser.add_argument(f"--{name}", type=kind, default=value)
    given = parser.parse_args()
    rates, sizes = alike(given.rate) if given.rate else of_this_machine(), groups()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        config = configuration(given.cells, folder / "model")
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        snakemake(folder, "-n")  # what the first run of all reads from disk is not what is asked for
        planned, text = snakemake(folder, "-n", "--quiet", "rules", "host", "reason")
        works = {work.stage: work for work in forecast(Plan(load(config), ROOT), {"demo": shape_of(folder / "model")})}
    jobs, local = jobs_of(text), {"cards", "tables", "figures", "report", "all"}
    print(f"{given.cells:,} cells, {sum(jobs.values()):,} jobs, planned in {planned:.1f} s; {rates.products:.1e} operations/s")
    print("| rule | jobs | in one | submissions | own, s | overhead, s | share |\n|---|---:|---:|---:|---:|---:|---:|")
    total = [0, 0.0, 0.0]
    for rule, count in ((rule, count) for rule, count in jobs.items() if rule not in local):
        size, work = sizes.get(rule, 1), works.get(rule)
        own = work.seconds(rates) if work else count * 5.0
        submissions = math.ceil(count / size)
        overhead = submissions * given.start + (count - submissions) * given.member
        print(f"| {rule} | {count:,} | {size} | {submissions:,} | {own:,.0f} | {overhead:,.0f} | {overhead / own:.1%} |")
        total = [total[0] + submissions, total[1] + own, total[2] + overhead]
    print(f"{total[0]:,} submissions; overhead {total[2]:,.0f} s of {total[1]:,.0f} s: {total[2] / total[1]:.1%}")


if __name__ == "__main__":
    main()
