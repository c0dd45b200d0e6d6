"""What every job needs before it computes: a log, one-line errors, threads, a device, and its provenance."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from winnow.errors import InputError, absent, first_line, missing
from winnow.io.artifacts import before_sealing, file_digest
from winnow.io.records import Provenance
from winnow.jobs.code import check_code, check_place, check_scripts
from winnow.planning.outside import Digests


@dataclass(frozen=True)
class Job:
    """A started job: its resolved parameters, its device, and the provenance to store in what it writes."""

    spec: Any  # of the stage's type in `winnow.io.specs`
    device: str
    provenance: Provenance


def start_job(snakemake: Any) -> Job:
    """Set up logging and threads for a script of the workflow; called first in every script."""
    log, rule = Path(snakemake.log[0]), snakemake.rule
    sys.excepthook = partial(_show, rule, log)
    log.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(log, mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    logging.raiseExceptions = False  # a log that cannot be written stops no job; what the job writes says so
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    params: Any = dict(snakemake.params.items())
    scripts = Path(os.path.normpath(snakemake.scriptdir))
    check_place(scripts.parent)
    check_scripts(scripts, params)
    check_code(params)
    before_sealing(partial(check_code, params))
    provenance: Provenance = {
        "rule": rule,
        "wildcards": dict(snakemake.wildcards.items()),
        "params": params,
        "inputs": _inputs(snakemake.input, params.get("files", {})),
    }
    return Job(params.get("spec", {}), _device(snakemake), provenance)


def _inputs(paths: Any, planned: dict[str, str]) -> dict[str, str]:
    """{input: digest}. Raises InputError if a file of the user is not the one that the job was planned for."""
    outside = Digests()
    found = {}
    for path in dict.fromkeys(map(str, paths)):
        if path in planned:
            found[path] = outside.of(path)
            if found[path] != planned[path]:
                raise InputError(f"{path}: changed since this run was planned; run snakemake again")
        elif Path(path).is_file():
            found[path] = file_digest(path)
    return found


def _show(rule: str, log: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line why the job failed; a traceback only for what nobody foresaw, and only in the log."""
    if issubclass(kind, InputError):
        line = f"winnow: {rule}: {first_line(error)}"
    elif library := missing(error):
        line = f"winnow: {rule}: {absent(library)}"
    elif isinstance(error, OSError) and error.errno is not None:
        where = error.filename or Path.cwd()
        line = f"winnow: {rule}: {error.strerror}: {where}; nothing was written, run snakemake again after curing it"
    else:
        logging.error("".join(traceback.format_exception(kind, error, trace)))
        line = f"winnow: {rule}: {kind.__name__}: {first_line(error)} (traceback in {log})"
    logging.error(line)
    print(line, file=sys.stderr)


def _device(snakemake: Any) -> str:
    """`cuda` where the job was given a GPU and there is one, else `cpu`; sets the threads. No torch where none is used."""
    gpu = bool(snakemake.resources.get("gpu"))
    if not gpu and "torch" not in sys.modules:
        return "cpu"
    import torch

    torch.set_num_threads(snakemake.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    logging.info("device %s, %d threads", device, snakemake.threads)
    return device
