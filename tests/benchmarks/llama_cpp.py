"""Exports to GGUF in llama.cpp beside the dense model in F16: bytes, loss, tokens per second and memory, as rows of a CSV file.

    python -m tests.benchmarks.llama_cpp MODEL TEXT --calibration TEXT [--methods NAME[:KEEP] ...]
        [--length 256] [--windows 64] [--rounds 5] [--folder llama_cpp] [--csv FILE]

`MODEL` is a directory with a tokenizer, `TEXT` that of the evaluation. A method is the name of a preset, or a YAML file with the
content of one. It is compressed (the checkpoint stays in `--folder`), exported, and measured by llama.cpp in processes of their
own with one thread: the loss beside the loss that transformers computes of the checkpoint in float32; tokens per second of
processor time, of a prompt of one window and of 64 tokens one by one after it, the median of rounds in turns with F16; the memory
of the process with the model loaded and used (file pages that it reads included), and the part of it that no file backs. `q8_0`
is llama.cpp's own rounding of the dense model. `WINNOW_LLAMA_CPP_PYTHON` names an interpreter with llama-cpp-python; without it
one is built in `--folder`.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
import yaml

from tests.engines.llama import LlamaCpp, environment
from winnow.api import calibration_windows, compress, evaluate, evaluation_windows
from winnow.checkpoint.loading import load_model
from winnow.data.tokens import load_tokenizer
from winnow.engines.gguf.export import export_gguf
from winnow.engines.speed import uncompressed

NEW = 64  # tokens one by one
COLUMNS = (
    *("model", "file", "MB of the file", "perplexity of the checkpoint", "perplexity in llama.cpp", "difference, nats"),
    *("difference by window, nats", "prompt, tokens/s", "over f16", "decoding, tokens/s", "over f16 at decoding"),
    *("MB in memory", "MB of them without a file"),
)


def loss(model: Path, windows: torch.Tensor) -> np.ndarray:
    """(windows,) nats per token in float32."""
    rows = evaluate(load_model(model, "float32", "cpu"), windows)["per_window"]
    return np.array(rows["nll"]) / (windows.shape[1] - 1)


def files_of(given: argparse.Namespace, engine: LlamaCpp, calibration: torch.Tensor) -> dict[str, tuple[Path, Path]]:
    """{row: (GGUF file, the directory whose loss it should have)}."""
    folder, model = given.folder, given.model
    if not (folder / "f16").is_dir():
        export_gguf(uncompressed(model, folder / "dense"), folder / "f16", None, dtype="float16")
    found = {"f16": (folder / "f16" / "model.gguf", model), "q8_0": (folder / "q8_0.gguf", model)}
    engine.quantized(found["f16"][0], found["q8_0"][0])
    for method in given.methods:
        name, _, keep = method.partition(":")
        label = f"{Path(name).stem} {keep or 0.4}"
        checkpoint, out = folder / label, folder / f"{label} gguf"
        if not checkpoint.is_dir():
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8")) if name.endswith(".yaml") else name
            compress(model, calibration, content, float(keep or 0.4), nearest=True).save(checkpoint)
        if not out.is_dir():
            print(label, export_gguf(checkpoint, out, None).said, flush=True)
        found[label] = (out / "model.gguf", checkpoint)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["rounded_8bit:0.6", "rounded_4bit:0.3"])
    parser.add_argument("--folder", type=Path, default=Path("llama_cpp"))
    parser.add_argument("--length", type=int, default=256, help="tokens of a window, and of the prompt")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="rows are appended")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    engine = LlamaCpp(environment(given.folder / "venv"), given.folder / "jobs")
    tokenizer = load_tokenizer(given.model)
    calibration = calibration_windows(tokenizer, given.calibration.read_text(encoding="utf-8"), 32, 256)
    windows = evaluation_windows(tokenizer, given.text.read_text(encoding="utf-8"), given.length, given.windows)
    files = files_of(given, engine, calibration)
    speeds: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in files}
    for _ in range(given.rounds):
        for name, (file, _) in files.items():
            speeds[name].append(engine.measure(file, windows[:1].numpy(), "speed", new=NEW))
    losses: dict[Path, np.ndarray] = {}
    rows = []
    for name, (file, source) in files.items():
        losses[source] = losses[source] if source in losses else loss(source, windows)
        found = engine.measure(file, windows.numpy(), "losses")["losses"] / (given.length - 1)
        rows.append(row(given.model.resolve().name, name, file, losses[source], found, speeds))
        print(rows[-1], flush=True)
    if given.csv:
        new = not given.csv.is_file()
        with open(given.csv, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


def row(model: str, name: str, file: Path, own: np.ndarray, found: np.ndarray, speeds: dict) -> dict[str, str]:
    """A row of the table, from the losses of the checkpoint and of llama.cpp by window, and the rounds of all files."""
    one = {key: [float(round_[key]) for round_ in speeds[name]] for key in ("prompt", "decode", "resident", "anonymous")}
    dense = {key: [float(round_[key]) for round_ in speeds["f16"]] for key in ("prompt", "decode")}
    over = {key: np.median(np.divide(one[key], dense[key])) for key in dense}
    middle = {key: np.median(values) for key, values in one.items()}
    values = [model, name, f"{file.stat().st_size / 1e6:.2f}", f"{np.exp(own.mean()):.4f}", f"{np.exp(found.mean()):.4f}"]
    values += [f"{(found - own).mean():.1e}", f"{np.sqrt(np.mean((found - own) ** 2)):.1e}"]
    values += [f"{middle['prompt']:.0f}", f"{over['prompt']:.2f}", f"{middle['decode']:.0f}", f"{over['decode']:.2f}"]
    return dict(zip(COLUMNS, [*values, *(f"{middle[key] / 1e6:.0f}" for key in ("resident", "anonymous"))], strict=True))


if __name__ == "__main__":
    main()
