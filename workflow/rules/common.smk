# Configuration, plan, the params of every stage, and what is done around a run. Defines no rules.

import os
import sys
import time
from pathlib import Path

# From the place of this file: the main Snakefile is another's where this workflow is used as a module.
ROOT = Path(workflow.current_basedir).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from winnow.planning.config import load
from winnow.planning.config_sources import anchored, sources
from winnow.errors import InputError
from winnow.evaluation.base import EVALUATIONS, PLAIN
from winnow.planning.plan import Plan
from winnow.planning.runtimes import check_runtimes
from winnow.studies.base import STUDIES, study_of
from winnow.planning.fingerprints import MEMORY
from winnow.planning.forecast import numbers_of
from winnow.jobs.code import keep_to

# For all jobs: Arrow's own allocator reserves a GiB at its first table, which a limit on the data of a process counts.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
BEGAN = time.time()
ALL_CORES = (
    workflow.resource_settings.cores or 4
)  # of this run: nothing runs beside a job that takes them
# Given by --config, about how a target runs; no number depends on them.
PRUNE = str(config.pop("prune", False)).lower() == "true"
LIMITS = {key: config.pop(f"{key}_gb", None) for key in ("memory", "disk", "device")}
DEVICE = config.pop("device", None)


def stop_with(line):
    """End with a line, written at once: the logger writes from a thread of its own."""
    sys.stderr.write(f"winnow: {line}\n")
    sys.exit(1)


try:
    keep_to(ROOT)
    GIVEN = (
        workflow.config_settings
    )  # `configfiles` of the workflow are these first, then its own, or those of a workflow that uses it as a module
    NAMED = [Path(f) for f in workflow.configfiles[len(GIVEN.configfiles) :]]
    OWN = [f for f in NAMED if f.is_relative_to(ROOT / "config")]
    PARTS = sources(
        [] if GIVEN.replace_workflow_config else OWN,
        [*(f for f in NAMED if f not in OWN), *GIVEN.configfiles],
        GIVEN.config,
        sys.argv,
    )
    CONFIG = anchored(config, PARTS, ROOT)
    PLAN = Plan(
        load(CONFIG, PARTS),
        ROOT,
        MEMORY,
        numbers_of(workflow.resource_settings.overwrite_resources),
    )
    PLAN.cells.check_sources()
    check_runtimes(PLAN)
except InputError as error:
    stop_with(error)


wildcard_constraints:
    model=PLAN.pattern("models"),
    text=PLAN.pattern("texts"),
    other=PLAN.pattern("texts"),
    windows=PLAN.pattern("calibrations", "evaluations", kind="perplexity"),
    calibration=PLAN.pattern("calibrations"),
    method=PLAN.pattern("methods"),
    budget=PLAN.pattern("budgets"),
    recovery=PLAN.pattern("recoveries"),
    evaluation=PLAN.pattern("evaluations"),
    clustering="|".join(PLAN.clusterings()) or "none",
    timing="|".join(PLAN.timings()) or "none",
    shard=r"\d+-of-\d+|outer",
    part=r"\d+-of-\d+",
    study="|".join(PLAN.of_studies),
    task="|".join(PLAN.tasks()) or "none",


def stage(name):
    """The params of a stage: its specification, the fingerprints of its code, the versions of its libraries, and the digests of
    what it reads that no rule makes; of such files Snakemake is to judge no times, so rules have them as `ancient`.

    One dict each: Snakemake compares the set of values and drops their names. None may ask for `input` or `output`: Snakemake
    leaves such params out of its record.
    """

    def of_job(asked):
        def param(wildcards):
            try:
                return asked(name, dict(wildcards.items()))
            except InputError as error:  # Snakemake would show a traceback
                stop_with(f"{name}: {error}")

        return param

    return {
        "spec": of_job(PLAN.spec),
        "code": of_job(PLAN.fingerprint),
        "versions": of_job(PLAN.versions),
        "files": of_job(PLAN.files),
    }


def hold_folder():
    """One run at a time in a folder. Unlike Snakemake's own lock, this one ends with the run, however the run ends."""
    import fcntl

    for folder in (Path("results"), Path.cwd()):
        if folder.exists() and not os.access(folder, os.W_OK):
            stop_with(
                f"{folder} cannot be written to (read-only, or not yours); nothing was changed"
            )
    held = open(".snakemake/winnow.lock", "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stop_with(
            f"another run is at work in {Path.cwd()}; wait for it, or give this one a folder of its own with --directory"
        )
    globals()["HELD"] = held  # as long as this process lives


def print_stopped():
    """One line for each job that a cluster stopped in this run; retries may have finished what it was to do."""
    logs = getattr(workflow.executor_settings, "logdir", None)
    if logs and Path(logs).is_dir():
        from winnow.jobs.stopped import stopped

        for line in stopped(Path(logs), BEGAN):
            print(f"winnow: {line}", file=sys.stderr)


def print_report_path():
    """Where the results are, after a run that made them."""
    if Path("results/report.html").is_file():
        print(
            "Table: results/tables/summary.csv (python -m winnow show results). Report: results/report.html"
        )
