"""A job's script in a fork of a process that has imported what scripts use: imports are most of the time of a small job.

The process is the fork server of `multiprocessing`. The fork starts where the imports end, with threads and environment as a new
interpreter would have had them, so numbers do not depend on it.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import sys
import tempfile
from collections.abc import Iterable

# What the scripts of a sweep use; one that needs more imports it. With one of Transformers' models comes what all share.
PRELOADED = (
    "torch",
    "pandas",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "winnow.allocation.groups",
    "winnow.checkpoint.writer",
    "winnow.checkpoint.loading",
    "winnow.evaluation.perplexity",
    "winnow.recovery.base",
    "winnow.jobs.start",
    "winnow.calibration.statistics",
    "winnow.jobs.imported",  # last: it imports all kinds, and notes what was imported
)
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # files of their drivers
# Variables that say how many threads a library makes when it is loaded. No thread of theirs may stand when a process is forked.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOTO_NUM_THREADS")


def run_script(path: str, folder: str, threads: int, environment: dict[str, str], preloaded: Iterable[str] = ()) -> None:
    """Run a Python file in `folder` as `python path` would, with so many threads; called in the fork, whose exit code is the
    interpreter's. Fails if one of the modules `preloaded` does not exist: the fork server leaves out what it cannot import,
    without a word."""
    gc.freeze()  # a collection would look at all 400,000 objects of the imports, and copy the memory they share with the server
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew from the environment
    if "torch" in sys.modules:
        import torch
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(threads)
        threadpool_limits(threads)
    sys.argv = [path]
    try:
        for name in preloaded:
            importlib.import_module(name)
        runpy.run_path(path, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - as an interpreter does
        sys.excepthook(type(error), error, error.__traceback__)  # which the job has set; multiprocessing would not ask it
        sys.exit(1)
