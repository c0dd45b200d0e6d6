# Configuration, plan, the params of every stage, and what is done around a run. No rule stands here.

import gc
import os
import sys
from functools import cache
from pathlib import Path

import snakemake.common
import snakemake.rules
import snakemake.sourcecache
from snakemake.output_index import OutputIndex

# A plan of thousands of jobs is millions of objects that stay: looking for garbage among them takes a tenth of the time.
gc.set_threshold(1_000_000)
# Snakemake works these out anew for every job or input, though a few arguments come again and again: a quarter of the time.
snakemake.rules.get_function_params = cache(snakemake.common.get_function_params)
snakemake.common.get_function_params = snakemake.rules.get_function_params
snakemake.sourcecache.parse_uri = cache(snakemake.sourcecache.parse_uri)
OutputIndex.match_producers = cache(OutputIndex.match_producers)

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT / "src"))

from winnow import studies
from winnow.config import load
from winnow.errors import InputError
from winnow.explain import difference
from winnow.plan import Plan

ALL_CORES = (
    workflow.resource_settings.cores or 4
)  # of this run: nothing runs beside a job that takes them
# Given by --config, about how a target runs; no number depends on them.
PRUNE = str(config.pop("prune", False)).lower() == "true"
MEMORY_GB, DISK_GB = (config.pop(key, None) for key in ("memory_gb", "disk_gb"))
try:
    PLAN = Plan(
        load(config, [str(f) for f in workflow.configfiles]),
        ROOT,
        Path(".snakemake/winnow-code"),
    )
    PLAN.check_sources()
except InputError as error:
    print(f"winnow: {error}", file=sys.stderr)
    sys.exit(1)


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
    shard=r"\d+-of-\d+",
    study="|".join(PLAN.of_studies),
    task="|".join(PLAN.tasks()) or "none",


def stage(name):
    """The params of a stage: its specification, the fingerprints of its code, the versions of its libraries.

    One dict each: Snakemake compares the set of values and drops their names. `unrecorded` is for its effect only: a param
    that depends on the output is no part of Snakemake's record, and nothing else that a job depends on may be one.
    """
    spec = lambda wildcards: PLAN.spec(name, dict(wildcards.items()))
    code = lambda wildcards: PLAN.fingerprint(name, dict(wildcards.items()))
    versions = PLAN.versions(name)

    def unrecorded(wildcards, output):
        first = str(output[0])
        if is_unrecorded(first):
            today = {
                "spec": spec(wildcards),
                "code": code(wildcards),
                "versions": versions,
            }
            refuse_if_other(first, list(output), today)
        return ""

    return {"spec": spec, "code": code, "versions": versions, "unrecorded": unrecorded}


def is_unrecorded(path):
    """Whether a result is there that Snakemake has no record of: it would call it up to date.

    That happens where .snakemake was removed or results were copied.
    """
    record = workflow.persistence
    if not os.path.exists(path) or workflow.dag_settings.forceall:
        return False
    known = os.path.exists(record._record_path(record._metadata_path, path))
    return not known and not record._filter_incomplete_keys([path])


def refuse_if_other(path, outputs, today):
    """Stop if an unrecorded result was made with other params than today's: what it was made from stands in it, too."""
    if change := difference(outputs, today):
        print(
            f"winnow: {path}: {change}, and Snakemake's own record of it is gone; delete it, or make everything anew "
            "with --forceall",
            file=sys.stderr,
        )
        sys.exit(1)


def hold_folder():
    """One run at a time in a folder. Unlike Snakemake's own lock, this one ends with the run, however the run ends."""
    import fcntl

    for folder in (Path("results"), Path.cwd()):
        if folder.exists() and not os.access(folder, os.W_OK):
            print(
                f"winnow: {folder} cannot be written to (read-only, or not yours); nothing was changed",
                file=sys.stderr,
            )
            sys.exit(1)
    held = open(".snakemake/winnow.lock", "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(
            f"winnow: another run is at work in {Path.cwd()}; wait for it, or give this one a folder of its own with --directory",
            file=sys.stderr,
        )
        sys.exit(1)
    globals()["HELD"] = held  # as long as this process lives


def print_report_path():
    """Where the results are, after a run that made them."""
    if Path("results/report.html").is_file():
        print(
            "Table: results/tables/summary.csv (python -m winnow show results). Report: results/report.html"
        )
