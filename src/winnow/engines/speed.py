"""Time and memory of a checkpoint in a serving engine, compared with the dense model in the same engine.

An engine runs in an environment of its own, whose interpreter the configuration names: one process for the dense model and one
for the checkpoint, asked in turns (`winnow.engines.workers`).
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from winnow.engines.workers import run_llama_cpp, run_vllm
from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST
from winnow.models.config_json import METHOD
from winnow.structures.base import FORMATS

WORKERS = {"llama.cpp": run_llama_cpp, "vllm": run_vllm}
LINES = 3  # of an engine's last messages that are shown


class Process:
    """An engine that holds one model. Raises InputError, with the engine's last lines, if it stops."""

    def __init__(self, engine: str, python: str, job: dict[str, Any], log: Path):
        worker = str(WORKERS[engine].__file__)
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # its packages are its own
        self.engine, self.log = engine, log
        try:
            with open(log, "w", encoding="utf-8") as errors:
                self.process = subprocess.Popen(
                    [python, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=clean
                )
        except OSError as error:
            raise InputError(f"evaluation: python: {python}: {error.strerror}; name the interpreter that has {engine}") from error
        self.version = self.ask(job)["version"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            last = " | ".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LINES:])
            raise InputError(f"{self.engine} stopped (exit code {self.process.returncode}): {last or 'no message'}")
        return json.loads(answer)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()


def processes(
    stack: ExitStack, engine: str, python: str, models: dict[str, Path], job: dict[str, Any], folder: Path
) -> dict[str, Process]:
    """A process for every one of `models`; they are ended with `stack`."""
    made = {}
    for name, model in models.items():
        made[name] = stack.enter_context(Process(engine, python, {**job, "model": str(model)}, folder / f"{name}.log"))
    return made


def prepared(engine: str, dense: Path, checkpoint: Path | None, dtype: str, folder: Path) -> dict[str, Path]:
    """{dense, compressed: what the engine loads}: files in `folder` for llama.cpp, the directories themselves for vLLM.

    Raises InputError if the checkpoint cannot be exported."""
    given = {"dense": dense, **({} if checkpoint is None else {"compressed": checkpoint})}
    if engine == "vllm":
        return given
    from winnow.engines.gguf.export import FILE, export_gguf

    given["dense"] = uncompressed(dense, folder / "uncompressed")
    for name, source in given.items():
        export_gguf(source, folder / name, None, dtype=dtype)
    return {name: folder / name / FILE for name in given}


def uncompressed(dense: Path, folder: Path) -> Path:
    """A checkpoint of the dense model in which no matrix is compressed."""
    folder.mkdir(parents=True)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": METHOD, "format_version": FORMATS[0], "layers": {}}
    for path in dense.iterdir():
        if path.name not in ("config.json", MANIFEST):
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
