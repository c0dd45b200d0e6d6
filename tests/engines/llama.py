"""An environment with llama-cpp-python, which measures GGUF files in processes of its own (`llama_worker.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("llama_worker.py")
GIVEN = "WINNOW_LLAMA_CPP_PYTHON"  # an interpreter that has llama-cpp-python, so that it is not built again
PACKAGES = ("llama-cpp-python>=0.3.36,<0.4", "numpy")


def environment(folder: Path) -> Path:
    """The interpreter that the environment variable names, or one of a new environment in `folder`: minutes, as llama.cpp is
    compiled."""
    if given := os.environ.get(GIVEN):
        return Path(given)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *PACKAGES], check=True)
    return folder / "bin" / "python"


class LlamaCpp:
    """Measures GGUF files; every call is a new process."""

    def __init__(self, python: Path, work: Path):
        self.python, self.work = python, work
        work.mkdir(parents=True, exist_ok=True)

    def measure(self, file: Path, windows: np.ndarray, measure: str, **options) -> dict[str, np.ndarray]:
        """What `measure` (`losses`, `logits`, `tokens`, `speed`) finds of a file on windows of tokens (windows, length)."""
        np.save(self.work / "windows.npy", windows)
        job = {"file": str(file), "windows": str(self.work / "windows.npy"), "measure": measure, **options}
        (self.work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._run(str(self.work / "job.json"), str(self.work / "found.npz"))
        return dict(np.load(self.work / "found.npz"))

    def quantized(self, file: Path, target: Path) -> Path:
        """The Q8_0 that llama.cpp makes of a file."""
        np.save(self.work / "windows.npy", np.zeros((1, 1), np.int64))
        job = {"file": str(file), "windows": str(self.work / "windows.npy"), "measure": "quantize", "target": str(target)}
        (self.work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._run(str(self.work / "job.json"), str(self.work / "found.npz"))
        return target

    def _run(self, *arguments: str) -> None:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run([str(self.python), str(WORKER), *arguments], capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stderr[-2000:]
