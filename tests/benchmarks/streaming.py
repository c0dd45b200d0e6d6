"""A model that is larger than the memory allowed goes from statistics to perplexity, and the forecast of each peak is true.

    python -m tests.benchmarks.streaming [--layers 56] [--width 512] [--hidden 2048] [--vocabulary 8000] [--stored float32]
        [--limit 700] [--windows 2] [--length 128] [--threads 1] [--folder /tmp]

A model of Llama's form with random weights is made in a folder, and the workflow is run on it with `load: stream`: every job is
a process whose data the operating system limits to `--limit` MiB (RLIMIT_DATA). Printed: the peak of resident memory of each
stage (VmHWM, which counts pages of shared libraries, too), beside what `snakemake plan` forecasts. It fails if a job fails, if a
peak is above the limit, if a forecast is more than 15 % off, or if the model is smaller than the limit.

2 B parameters in 1.5 GiB, of which the factors take most of the time:

    python -m tests.benchmarks.streaming --layers 128 --width 1024 --hidden 4096 --vocabulary 32000 --stored bfloat16 \\
        --limit 1536

With `--recommended` it is the recommended preset instead, at a quarter of the bytes, with `factors: refitted`: statistics,
gradients, factors, predicted losses, the integer program, rounding, perplexity, and a refinement of two blocks. Of Llama-3.2-1B's
shape, hours on two cores:

    python -m tests.benchmarks.streaming --recommended --layers 16 --width 2048 --hidden 8192 --vocabulary 128256 \\
        --stored bfloat16 --limit 3072 --windows 16
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
OFF = 0.15  # that a forecast may be, of the peak
STAGES = ("retrieve_model", "collect_statistics", "collect_gradients", "factorize", "compress")
STAGES += ("evaluate_dense", "evaluate_perplexity")
RECOMMENDED = ("predict_losses", "compress_refitted", "recover")  # beside those, but for `compress`
RECORD = '''"""Peaks of resident memory and CPU seconds: a line per job."""
import atexit, os, sys, time

def record():
    job = getattr(sys.modules["__main__"], "snakemake", None)
    if hasattr(job, "rule"):
        with open("/proc/self/status") as status, open(os.environ["WINNOW_PEAKS"], "a") as peaks:
            high = next(line for line in status if line.startswith("VmHWM")).split()[1]
            peaks.write(f"{job.rule} {high} {time.process_time()}\\n")

atexit.register(record)
'''


def write_model(folder: Path, layers: int, width: int, hidden: int, vocabulary: int, stored: str) -> int:
    """A directory with a model of random weights, written tensor by tensor; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.models.weights import write_weights

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype=stored,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, stored)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                yield name, torch.ones(weight.shape, dtype=dtype)
            else:
                scale = 0.5 * weight.shape[1] ** -0.5
                yield name, torch.empty(weight.shape, dtype=dtype).normal_(0, scale, generator=generator)

    total = write_weights(folder, tensors(), 1 << 30)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources" / "models" / "demo" / name, folder / name)
    return total


def configuration(model: Path, windows: int, length: int, load: str = "stream") -> dict:
    """Two methods, one of which needs gradients, at one budget, with the dense model beside them."""
    rows: dict = {"format": "jsonl", "stop": 60}
    texts = ROOT / "resources" / "texts" / "demo"
    return {
        "models": {"large": {"source": str(model), "load": load}},
        "texts": {part: {"files": [str(texts / f"{part}.jsonl")], **rows} for part in ("calibration", "evaluation")},
        "calibrations": {"c": {"text": "calibration", "windows": windows, "length": length, "precision": "float32"}},
        "methods": {
            name: {"structure": {"kind": "low_rank"}, "metric": {"kind": kind}}
            for name, kind in (("whitened", "gram"), ("kfac", "two_sided"))
        },
        "budgets": {"all-0.8": {"targets": ["ffn", "attention"], "keep_bytes": 0.8}},
        "evaluations": {"e": {"text": "evaluation", "protocol": "p1", "length": length, "windows": windows}},
        "experiments": {
            "x": {
                "models": ["large"],
                "calibrations": ["c"],
                "methods": ["whitened", "kfac"],
                "budgets": ["all-0.8"],
                "evaluations": ["e"],
            }
        },
    }


def recommended(config: dict) -> dict:
    """The same model and texts with `winnow` and a refinement of two blocks."""
    found = {**config, "budgets": {"all-0.25": {"targets": ["ffn", "attention"], "keep_bytes": 0.25}}}
    found["models"]["large"]["factors"] = "refitted"
    found["recoveries"] = {"two": {"kind": "refine", "steps": 10, "every": 5, "layers": [0, 1]}}
    found["experiments"]["x"] |= {"methods": ["winnow"], "budgets": ["all-0.25"], "recoveries": ["none", "two"]}
    del found["methods"]
    return found


def run(folder: Path, config: dict, limit: int, threads: int, target: str = "perplexity") -> tuple[int, str]:
    """(exit status, output) of the workflow, one job after another, with the data of every process limited to `limit` bytes."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "record").mkdir(exist_ok=True)
    (folder / "record" / "sitecustomize.py").write_text(RECORD)
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(ROOT / "Snakefile"), "--cores", str(threads)]
    command += ["--directory", str(folder), "--replace-workflow-config", "--configfile", str(folder / "config.yaml")]
    command += ["--resources", "job_slots=1", "--default-resources", "job_slots=1"]
    env = {**os.environ, "WINNOW_PEAKS": str(folder / "peaks.txt"), "HF_HUB_OFFLINE": "1"}
    env["WINNOW_WARM"] = "0"  # a fork ends without the exit of an interpreter, which writes the peak
    env["PYTHONPATH"] = os.pathsep.join([str(folder / "record"), *filter(None, [os.environ.get("PYTHONPATH")])])
    bound = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=bound)
    return done.returncode, done.stdout + done.stderr


def peaks(folder: Path) -> dict[str, int]:
    """{rule: bytes of the largest peak among its jobs}"""
    found: dict[str, int] = {}
    for line in (folder / "peaks.txt").read_text().splitlines():
        stage, high, _ = line.split()
        found[stage] = max(found.get(stage, 0), int(high) << 10)
    return found


def forecasts(config: dict, manifest: Path) -> dict[str, float]:
    """{rule: bytes} as `snakemake plan` prints them."""
    from winnow.models.shape import shape_of
    from winnow.planning.config import load
    from winnow.planning.forecast import forecast
    from winnow.planning.plan import Plan

    shape = shape_of(Path(config["models"]["large"]["source"]), manifest)
    return {work.stage: work.memory for work in forecast(Plan(load(config), ROOT), {"large": shape})}


def measured(folder: Path, config: dict) -> list[tuple[str, float, float]]:
    """(stage, peak, forecast) in bytes."""
    manifest = next((folder / "results").glob("large-*/model.json"))
    expected, found = forecasts(config, manifest), peaks(folder)
    return [(stage, found[stage], expected[stage]) for stage in (*STAGES, *RECOMMENDED) if stage in found]


def seconds(folder: Path) -> dict[str, float]:
    """{rule: seconds of all its jobs}, from Snakemake's benchmark files."""
    found: dict[str, float] = {}
    for path in (folder / "results" / "benchmarks").rglob("*.tsv"):
        stage = path.relative_to(folder / "results" / "benchmarks").parts[0].removesuffix(".tsv")
        with open(path, newline="", encoding="utf-8") as stream:
            found[stage] = found.get(stage, 0.0) + sum(float(row["s"]) for row in csv.DictReader(stream, delimiter="\t"))
    return found


def of_folder(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"layers": 56, "width": 512, "hidden": 2048, "vocabulary": 8000, "limit": 700, "windows": 2, "length": 128}
    for name, value in {**options, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32", help="dtype of the files")
    parser.add_argument("--folder", type=Path, default=None, help="where the model and all results are made, and removed")
    parser.add_argument("--recommended", action="store_true", help="`winnow`, with a refinement, instead of two factored methods")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        began = time.monotonic()
        size = write_model(folder / "model", given.layers, given.width, given.hidden, given.vocabulary, given.stored)
        limit = given.limit * MIB
        unit = 4 if given.stored == "float32" else 2
        print(f"{size / unit / 1e9:.2f} B parameters, {size / MIB:,.0f} MiB on disk, {given.limit:,} MiB allowed", flush=True)
        config = configuration(folder / "model", given.windows, given.length)
        config = recommended(config) if given.recommended else config
        status, output = run(folder, config, limit, given.threads)
        if status:
            sys.exit(f"{output[-3000:]}\nthe workflow failed within {given.limit} MiB")
        rows, taken = measured(folder, config), seconds(folder)
        print("| stage | peak, MiB | forecast, MiB | forecast / peak | seconds |\n|---|---:|---:|---:|---:|")
        for stage, peak, expected in rows:
            print(f"| {stage} | {peak / MIB:,.0f} | {expected / MIB:,.0f} | {expected / peak:.2f} | {taken.get(stage, 0):,.0f} |")
        for result in sorted((folder / "results").glob("large-*/c-*/*/*/*/e-*.json")):
            loss = json.loads(result.read_text())
            of = "/".join(part.rpartition("-")[0] or part for part in result.relative_to(folder / "results").parts[2:5])
            print(f"{of}: loss {loss['nll']:.4f} nats per token, KL {loss['kl']:.4f}")
        times = of_folder(folder / "results") / size
        print(f"results {times:.1f} times the model's bytes; {time.monotonic() - began:,.0f} s in all")
    wrong = [stage for stage, peak, expected in rows if peak > limit or abs(expected / peak - 1) > OFF]
    if wrong or size < limit:
        sys.exit(f"above the limit or forecast wrong: {', '.join(wrong) or 'none, but the model is smaller than the limit'}")


if __name__ == "__main__":
    main()
