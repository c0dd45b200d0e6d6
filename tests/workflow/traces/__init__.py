"""The way back from a study to what its numbers rest on, by `winnow explain` alone, and the arithmetic that they share.

Nothing here calls winnow, and no path is known beforehand but that of the study's own manifest.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open


class Trace:
    """What `winnow explain` prints of a study: its artefacts, the rule and params that made each, and their parents."""

    def __init__(self, folder: Path, study: str):
        self.folder, self.top = folder, f"results/studies/{study}/manifest.json"
        own = ["--configfile", "config.yaml", "--replace-workflow-config"] if (folder / "config.yaml").exists() else []
        command = [sys.executable, "-m", "winnow", "explain", self.top, *own]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        self.parents: dict[str, list[str]] = {}
        self.rules: dict[str, str] = {}
        self.params: dict[str, dict] = {}
        self.damaged: list[str] = []  # inputs that are gone, or not those that the artefact was made from
        open_ones: list[str] = []  # the artefacts that the line is indented under
        for line in done.stdout.splitlines():
            depth, text = (len(line) - len(line.lstrip())) // 2, line.strip()
            if made := re.match(r"made by (\w+), from \d+ modules", text):
                self.rules[open_ones[depth - 1]] = made[1]
            elif text.startswith("params: "):
                self.params[open_ones[depth - 1]] = json.loads(text.removeprefix("params: "))
            elif text.startswith("differs today: input: "):
                self.damaged.append(text)
            elif parent := re.match(r"from (.+?)(?: \(above\)|, sha256 \w+)$", text):
                self.parents[open_ones[depth - 1]].append(parent[1])
            elif not re.match(r"(versions|differs today|up to date)\b", text):
                del open_ones[depth:]
                if depth:
                    self.parents[open_ones[-1]].append(text)
                open_ones.append(text)
                self.parents[text] = []

    def above(self, artefact: str) -> Iterator[str]:
        """All that an artefact was made from, the nearest first."""
        queue, seen = [artefact], {artefact}
        while queue:
            for parent in self.parents.get(queue.pop(0), []):
                if parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
                    yield parent

    def made_by(self, rule: str, artefact: str = "") -> str:
        """The nearest artefact above (above the study, if none is named) that `rule` made."""
        return next(found for found in self.above(artefact or self.top) if self.rules.get(found) == rule)

    @property
    def model(self) -> Path:
        """The file of the dense model's weights."""
        (found,) = (p for p in self.parents[self.made_by("retrieve_model")] if p.endswith(".safetensors"))
        return self.folder / found

    def result(self, method: str, budget: str, recovery: str = "none") -> str:
        """The evaluation of a cell: the study's params name it, and it must be one of the study's parents."""
        rows, key = self.params[self.top]["rows"], (method, budget, recovery)
        (found,) = (row["result"] for row in rows if (row["method"], row["budget"], row["recovery"]) == key)
        assert found in self.parents[self.top]
        return found

    def windows(self, *cell: str) -> tuple[np.ndarray, np.ndarray]:
        """(sums of nats, tokens) of every window of a cell, whose evaluation must rest on the dense model, on tokens and (but for
        the dense model itself) on a checkpoint."""
        result = self.result(*cell)
        rules = {self.rules.get(found) for found in self.above(result)}
        assert {"retrieve_model", "tokenize", "retrieve_text"} <= rules
        assert cell[0] == "dense" or {"compress", "factorize"} <= rules
        found = json.loads((self.folder / result).read_text(encoding="utf-8"))["per_window"]
        return np.array(found["nll"]), np.array(found["tokens"])

    def checkpoint(self, *cell: str) -> Path:
        """The file of the weights of a cell's checkpoint."""
        (found,) = (self.folder / self.made_by("compress", self.result(*cell))).parent.glob("*.safetensors")
        return found

    def moments(self) -> list[Path]:
        """The statistics that the study's measurement read, layer by layer."""
        manifest = self.folder / self.made_by("collect_statistics", self.made_by("measure_study"))
        return sorted(manifest.parent.glob("*.safetensors"))


def tensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as stream:
        return {name: stream.get_tensor(name).astype(np.float64) for name in stream.keys()}


def numbers(path: Path) -> int:
    """How many numbers a file stores, from the shapes."""
    with safe_open(path, "np") as stream:
        return sum(int(np.prod(stream.get_slice(name).get_shape())) for name in stream.keys())


def quotient(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """(sum over sum, its standard error with windows as the independent unit)."""
    n, value = len(part), part.sum() / whole.sum()
    return value, np.sqrt(n / (n - 1) * np.sum((part - value * whole) ** 2)) / whole.sum()


def apart(trace: Trace, one: tuple[str, ...], other: tuple[str, ...]) -> tuple[float, float]:
    """(nats per token of one cell above another, standard error), window by window."""
    (a, tokens), (b, same) = trace.windows(*one), trace.windows(*other)
    assert (tokens == same).all()
    return quotient(a - b, tokens)


def energies(weight: np.ndarray) -> np.ndarray:
    """Squared singular values, the largest first."""
    return np.linalg.svd(weight, compute_uv=False) ** 2


def role(weights: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    """The matrices of a role, in the order of the layers."""
    found = [key for key in weights if key.endswith(f"{name}.weight") and weights[key].ndim == 2]
    return [weights[key] for key in sorted(found, key=lambda key: [int(n) for n in re.findall(r"\d+", key)])]
