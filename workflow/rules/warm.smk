# Scripts run in forks of one process that has imported what they use (src/winnow/jobs/fork.py), where a run has several jobs.
# Defines no rules, and no number depends on it; patches.smk puts it in. WINNOW_WARM=0 runs every script in an interpreter.

import multiprocessing
import os
import sys
from contextlib import nullcontext
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CalledProcessError
from threading import Lock

from snakemake.benchmark import benchmarked
from snakemake.shell import shell

from winnow.jobs.fork import GPUS, PRELOADED, THREADS, run_script

# Of Snakemake, what a script needs to read what it was given.
UNPICKLED = ("snakemake.script", "snakemake.shell", "snakemake.utils")
# Multiprocessing sees to all its processes in each thread, and an exit code can be read once.
FORKS = Lock()


@cache
def server():
    """What processes are forked from, or None: for few jobs it is not worth its memory, and where there is a GPU a library that
    asks for it while it is imported would leave it useless in all forks.
    """
    few = sum(not job.is_norun for job in workflow.dag.needrun_jobs()) < 3
    gpu = any(Path(driver).exists() for driver in GPUS)
    off = os.environ.get("WINNOW_WARM") == "0"
    if few or gpu or off or sys.platform != "linux":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*UNPICKLED, *PRELOADED])
    outside = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    multiprocessing.forkserver.ensure_running()
    for name, value in outside.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def in_forks(starts):
    """Run a script in a fork where there is a server of them, else as Snakemake does, which starts an interpreter."""

    def execute_script(script, fname, edit=False):
        elsewhere = script.conda_env, script.container_img, script.env_modules
        with FORKS:
            context = None if any(elsewhere) or script.shadow_dir else server()
        if context is None:
            return starts(script, fname, edit)
        environment = {**os.environ, **dict.fromkeys(THREADS, str(script.threads))}
        if tmpdir := script.resources.get("tmpdir"):
            environment.update(
                dict.fromkeys(("TMPDIR", "TMP", "TEMP", "TEMPDIR"), tmpdir)
            )
        given = (fname, os.getcwd(), script.threads, environment, PRELOADED)
        process = context.Process(target=run_script, args=given)
        with FORKS:
            process.start()
            shell._processes[script.jobid] = process
        record = script.bench_record
        with nullcontext() if record is None else benchmarked(process.pid, record):
            wait([process.sentinel])
        with FORKS:
            process.join()
            shell._processes.pop(script.jobid, None)
        if code := process.exitcode:
            raise CalledProcessError(code, f"{sys.executable} {fname}")

    return execute_script
