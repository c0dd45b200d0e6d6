# Configuration, plan, the params of every stage, and what is done around a run. No rule stands here.

import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT / "src"))

from winnow.config import load
from winnow.errors import InputError
from winnow.plan import Plan

ALL_CORES = (
    workflow.resource_settings.cores or 4
)  # of this run: nothing runs beside a job that takes them
PRUNE = str(config.pop("prune", False)).lower() == "true"
try:
    PLAN = Plan(load(config, [str(f) for f in workflow.configfiles]), ROOT)
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


def stage(name):
    """The three params of a stage: its specification, the fingerprints of its code, the versions of its libraries.

    One dict each: Snakemake compares the set of values and drops their names.
    """
    return {
        "spec": lambda wildcards: PLAN.spec(name, dict(wildcards.items())),
        "code": lambda wildcards: PLAN.fingerprint(name, dict(wildcards.items())),
        "versions": PLAN.versions(name),
    }


def hold_folder():
    """One run at a time in a folder. Unlike Snakemake's own lock, this one ends with the run, however the run ends."""
    import fcntl

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
