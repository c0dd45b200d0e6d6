"""Quantisers' own packages on a model, measured as winnow measures its own checkpoints.

    python -m tests.benchmarks.quantisers CONFIG.yaml --python PYTHON --csv FILE --models NAME ... --quantisers hqq ...
        --forms 4/128 3/32 ... [--calibration NAME] [--evaluation NAME] [--seeds 0 1 2]

Models, texts, calibrations and evaluations are those of a configuration of winnow. `PYTHON` is an interpreter of an environment
of its own, with torch 2.13.0, transformers 5.23.0, datasets 5.2.0 and for `rtn`, `gptq` and `awq` llmcompressor 0.14.0.1 with
compressed-tensors 0.19.0 (installed without their dependencies, as they ask for transformers of at most 5.17), for `hqq` hqq
0.2.8.post1 and for `autoround` auto-round 0.16.1. All matrices of the blocks are rounded; embeddings and head are not. A row of
the CSV is appended once it is measured, and rows that it already has are not measured again. `kept` are the bytes of codes,
float16 scales and zero points over those of 16-bit matrices, without padding; `loss` is in nats per token above dense, with the
paired standard error over windows; `kl` is KL(dense || rounded) per token; `seconds` are those of one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from winnow.checkpoint.loading import load_model
from winnow.data.texts import read_rows
from winnow.data.tokens import calibration_windows, encode, evaluation_windows, load_tokenizer
from winnow.evaluation.perplexity import evaluate, summarize_windows
from winnow.planning.config import Text

WORKER = Path(__file__).with_name("quantisers_worker.py")
UNCALIBRATED = ("rtn", "hqq")  # the same for all seeds
FIELDS = ["model", "quantiser", "version", "bits", "group", "seed", "kept", "loss", "loss_error", "kl", "kl_error", "seconds"]
KEY = FIELDS[:2] + FIELDS[3:6]


class Bench:
    """A dense model with the windows of a configuration."""

    def __init__(self, config: dict[str, Any], model: str, calibration: str, evaluation: str):
        self.path, self.calibration = Path(config["models"][model]["source"]), config["calibrations"][calibration]
        tokenizer, test = load_tokenizer(self.path), config["evaluations"][evaluation]

        def ids(name: str, special: bool) -> np.ndarray:
            text = Text(**config["texts"][name])
            return encode(tokenizer, text.join.join(read_rows(text.model_dump())), special)

        self.training = ids(self.calibration["text"], self.calibration.get("special_tokens", True))
        found = evaluation_windows(ids(test["text"], False), "plain", test["length"], None, test["windows"], None)
        self.ids, self.first = (torch.from_numpy(part) for part in found)
        self.dense = load_model(self.path, "float32", "cpu")
        self.losses = evaluate(self.dense, None, self.ids, self.first, 16)

    def rows(self, python: str, quantiser: str, seed: int, forms: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """The figures of the model in every form (bits, group), each as soon as it is there."""
        with tempfile.TemporaryDirectory() as folder:
            windows, given, specs = Path(folder) / "windows.npy", self.calibration, {}
            np.save(windows, calibration_windows(self.training, given["windows"], given["length"], seed))
            for bits, group in forms:
                spec, own = Path(folder) / f"{bits}-{group}.json", {"bits": bits, "group": group, "seed": seed}
                own |= {"model": str(self.path.resolve()), "quantiser": quantiser}
                spec.write_text(json.dumps({**own, "windows": str(windows), "out": str(spec.with_suffix(""))}), encoding="utf-8")
                specs[str(spec)] = own | {"model": self.path.name}
            with subprocess.Popen([python, str(WORKER), *specs], stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                for line in worker.stdout:
                    word, _, spec = line.strip().partition(" ")
                    if word == "SAVED":
                        yield specs[spec] | self.measured(Path(spec).with_suffix(""), specs[spec]["bits"])
            if worker.returncode:
                sys.exit(f"{quantiser} failed on {self.path}; see its messages above")

    def measured(self, out: Path, bits: int) -> dict[str, str]:
        """The figures of a rounded model."""
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        rows = evaluate(load_model(out, "float32", "cpu"), self.dense, self.ids, self.first, 16)
        dense: Any = {"per_window": self.losses}
        found: Any = summarize_windows(rows, dense)
        figures = [self.kept(report, bits), *(found[key] for key in ("delta_nll", "delta_nll_se", "kl", "kl_se"))]
        numbers = [f"{figure:.6f}" for figure in figures] + [f"{report['seconds']:.1f}"]
        return {"version": report["version"], **dict(zip(FIELDS[6:], numbers, strict=True))}

    def kept(self, report: dict[str, Any], bits: int) -> float:
        """Stored bits of the matrices over 16 bits a number."""
        own, stored, all_bits = dict(self.dense.named_modules()), 0.0, 0.0
        for name, groups in report["groups"].items():
            numbers = own[name].weight.numel()  # type: ignore[union-attr, operator]
            stored += numbers * bits + groups * (16 + report["zero_bits"])
            all_bits += 16 * numbers
        return stored / all_bits


def asked(description: str | None) -> argparse.ArgumentParser:
    """The options that this benchmark and `factored_peers` have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser


def begun(path: Path, fields: Sequence[str], key: Sequence[str]) -> set[tuple[str, ...]]:
    """The keys of the rows that a CSV file has; a missing file is made, with its header."""
    if path.exists():
        with path.open(encoding="utf-8", newline="") as stream:
            return {tuple(row[name] for name in key) for row in csv.DictReader(stream)}
    path.write_text(",".join(fields) + "\n", encoding="utf-8")
    return set()


def main() -> None:
    parser = asked(__doc__)
    parser.add_argument("--quantisers", nargs="+", required=True)
    parser.add_argument("--forms", nargs="+", default=["4/128", "4/32", "3/128", "3/32", "2/128", "2/32"])
    given = parser.parse_args()
    config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    done = begun(given.csv, FIELDS, KEY)
    every: list[Any] = [tuple(map(int, form.split("/"))) for form in given.forms]
    for name in given.models:
        bench = Bench(config, name, given.calibration, given.evaluation)
        for quantiser in given.quantisers:
            for seed in given.seeds[:1] if quantiser in UNCALIBRATED else given.seeds:
                forms = [
                    (bits, group) for bits, group in every if (name, quantiser, str(bits), str(group), str(seed)) not in done
                ]
                for row in bench.rows(given.python, quantiser, seed, forms) if forms else ():
                    print(row, flush=True)
                    with given.csv.open("a", encoding="utf-8", newline="") as stream:
                        csv.DictWriter(stream, FIELDS, lineterminator="\n").writerow(row)


if __name__ == "__main__":
    main()
