"""Recipes of papers by their authors' own code and by winnow's presets, on the same windows.

    python -m tests.benchmarks.factored_peers CONFIG.yaml --python PYTHON --csv FILE --models NAME ... --calibration NAME
        --evaluation NAME --repositories lqer=DIR svd_llm_gptq=DIR spq=DIR [--seeds 0 ...]

Models, texts, calibrations and evaluations are those of a configuration of winnow. The directories are clones of the repositories
ChengZhang-98/lqer (of 88b6960c69), AIoT-MLSys-Lab/SVD-LLM (1c1009a99b) and JiaminYao/SPQ_LLM_Compression (5a745b8dc6) on GitHub.
`PYTHON` is an interpreter with torch 2.13.0, transformers 5.23.0, accelerate, colorlog, datasets, pandas, toml and tqdm. A
setting that the CSV has is not measured again.

`code` is `authors` or `preset`, with what is changed; a preset has the bytes of `authors`, as near as its forms allow. `kept` are
stored bytes of the matrices of the blocks over those of 16-bit matrices; `loss` is in nats per token above dense and `kl` is
KL(dense || model) per token, with standard errors over windows; `difference` is the loss above that of `authors` in the same
setting, with its paired standard error; `seconds` are those of one core.
"""

from __future__ import annotations

import copy
import csv
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.benchmarks.quantisers import Bench, asked, begun
from winnow.api import compress
from winnow.checkpoint.loading import load_model
from winnow.data.tokens import calibration_windows
from winnow.evaluation.perplexity import evaluate, summarize_windows
from winnow.evaluation.spread import paired
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.planning.presets import methods

WORKER = Path(__file__).with_name("factored_peers_worker.py")
# LQER: rank 32 of 4,096 inputs as a share of 128, and ranks at which the low-rank term matters more on a narrow model. SVD-LLM:
# `ratio` is the share of the numbers that the factors keep. SPQ: the share of the variance, and the largest of neurons; or
# shares of attention's ranks or of the neurons that every layer keeps, and what is not named stays as it is.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lqer": [
        {"bits": 4, "block": 16, "group": 32, "rank": 1},
        {"bits": 4, "block": 16, "group": 32, "rank": 32},
        {"bits": 3, "block": 32, "group": 64, "rank": 32},
    ],
    "svd_llm_gptq": [{"bits": 4, "ratio": 0.8}, {"bits": 4, "ratio": 0.6}],
    "spq": [
        {"variance": 0.96, "pruned": 0.05, "scales": "names"},
        {"variance": 0.96, "pruned": 0.05, "scales": "rows"},
        {"variance": 0.9, "pruned": 0.3, "scales": "rows"},
        {"rank": 0.375, "scales": "rows"},
        {"neurons": 0.9, "scales": "rows"},
    ],
}
CODES = {
    "lqer": ("authors", "authors, numbers of winnow"),
    "svd_llm_gptq": ("authors", "authors, not rounded"),
    "spq": ("authors",),
}
FIELDS = ["model", "recipe", "setting", "code", "version", "seed", "kept", "loss", "loss error", "kl", "kl error"]
FIELDS += ["difference", "difference error", "seconds"]
KEY = ("model", "recipe", "setting", "seed")


class Peers(Bench):
    """A dense model with the windows of a configuration, and what recipes of others make of it."""

    def __init__(self, config: dict[str, Any], model: str, calibration: str, evaluation: str):
        super().__init__(config, model, calibration, evaluation)
        self.matrices = ModelFiles(describe(self.path)).matrices
        self.bytes = sum(2 * m.shape[0] * m.shape[1] for m in self.matrices)
        self.authors: Any = None  # losses of their code in the setting at hand, by window

    def rows(self, python: str, recipe: str, clone: str, seed: int, setting: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The figures of every code of a recipe in a setting."""
        given = self.calibration
        windows = calibration_windows(self.training, given["windows"], given["length"], seed)
        spec = {"model": str(self.path.resolve()), "recipe": recipe, "repository": clone, "seed": seed, "setting": setting}
        kept = 1.0
        for code in CODES[recipe]:
            with tempfile.TemporaryDirectory() as folder:
                file, out = Path(folder) / "spec.json", Path(folder) / "model"
                np.save(Path(folder) / "windows.npy", windows)
                where = {"windows": str(Path(folder) / "windows.npy"), "out": str(out)}
                file.write_text(json.dumps({**spec, **where, "code": code}), encoding="utf-8")
                subprocess.run([python, str(WORKER), str(file)], check=True)
                report = json.loads((out / "report.json").read_text(encoding="utf-8"))
                share = report["bits"] / 8 / self.bytes
                kept = share if code == "authors" else kept
                own = {"code": code, "version": report["version"], "seconds": f"{report['seconds']:.1f}"}
                yield spec | own | self.figures(load_model(out, "float32", "cpu"), code, share)
        for code, method, targets in self.ours(recipe, setting):
            began = time.process_time()
            found = compress(self.path, torch.from_numpy(windows), method, kept, targets=targets, nearest=True, seed=seed)
            share = 1 - (found.report.dense_bytes - found.report.stored_bytes) / self.bytes
            own = {"code": code, "version": version("winnow"), "seconds": f"{time.process_time() - began:.1f}"}
            yield spec | own | self.figures(found.model, code, share)

    def figures(self, model: Any, code: str, kept: float) -> dict[str, Any]:
        """Those of a model; the first of a setting are those of the authors' code."""
        rows: Any = evaluate(model, self.dense, self.ids, self.first, 16)
        dense: Any = {"per_window": self.losses}
        found: Any = summarize_windows(rows, dense)
        self.authors = rows if code == "authors" else self.authors
        numbers = [kept, *(found[key] for key in ("delta_nll", "delta_nll_se", "kl", "kl_se")), *paired(rows, self.authors)]
        return {"model": self.path.name, **dict(zip(FIELDS[6:13], (f"{number:.5f}" for number in numbers), strict=True))}

    def ours(self, recipe: str, setting: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """(code, method, targets) of winnow's presets in a setting."""
        preset, every = methods()[recipe], ["ffn", "attention"]
        structure = copy.deepcopy(preset["structure"])
        if recipe == "lqer":
            structure |= {"kept": setting["rank"]}
            del structure["kept_fraction"]
            structure["remainder"] |= {"bits": [setting["bits"]], "group": setting["group"]}
        if recipe == "svd_llm_gptq":
            structure |= {"bits": [setting["bits"]]}
            roles = {m.role: m.shape for m in self.matrices}
            ranks = {role: int(m * n * setting["ratio"] / (m + n)) / min(m, n) for role, (m, n) in roles.items()}
            parts = {role: structure | {"ranks": [share]} for role, share in ranks.items()}
            yield "preset, ranks of authors", preset | {"structure": {"kind": "by_target", "parts": parts}}, every
        if recipe == "spq" and "rank" in setting:
            (own,) = (member["parts"]["attention"] for member in structure["members"] if "parts" in member)
            yield "preset", {"structure": own | {"ranks": [setting["rank"]]}, "metric": preset["metric"]}, ["attention"]
        elif "neurons" in setting:
            (own,) = (member for member in structure["members"] if member["kind"] == "rounded_neuron_slice")
            yield "preset", {"structure": own | {"neurons": [setting["neurons"]]}}, ["ffn"]
        else:
            yield "preset", preset | {"structure": structure}, every


def main() -> None:
    parser = asked(__doc__)
    parser.add_argument("--repositories", nargs="+", required=True)
    given = parser.parse_args()
    config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    done = begun(given.csv, FIELDS, KEY)
    for name in given.models:
        bench = Peers(config, name, given.calibration, given.evaluation)
        for recipe, clone in (pair.split("=", 1) for pair in given.repositories):
            for seed, setting in itertools.product(given.seeds, SETTINGS[recipe]):
                called = ", ".join(f"{key} {value}" for key, value in setting.items())
                if (bench.path.name, recipe, called, str(seed)) in done:
                    continue
                rows = [row | {"setting": called} for row in bench.rows(given.python, recipe, clone, seed, setting)]
                with given.csv.open("a", encoding="utf-8", newline="") as stream:
                    csv.DictWriter(stream, FIELDS, extrasaction="ignore", lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
