# What of Snakemake is replaced while it runs, in one table. Defines no rules.
#
# An entry is applied only where Snakemake's own code is the one that it was written for, by the digest of its source. Elsewhere
# one line says so, and Snakemake does it its own way: slower, or with work repeated. Without the entry for the truth of results
# nothing is run. WINNOW_PATCHES=0 leaves out those for speed.

import ast
import hashlib
import inspect
import os
import sys
import textwrap

import snakemake
import snakemake.common
import snakemake.io
import snakemake.rules
from snakemake.dag import DAG, ScriptProcessor
from snakemake.persistence import PersistenceBase
from snakemake.rules import Rule
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake.script import PythonScript


def source_digest(thing):
    """A digest of the source of a function or a class, comments and spacing left out.

    Empty where there is no source: an installation of compiled files alone, or no Python function.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:10]


instead = lambda new: lambda original: new
TRUTH, WORK, SPEED = "truth", "work", "speed"
PATCHES = [  # owner, attribute, digest of its source (Snakemake 9.20.0 to 9.27.1), what it is made to, kind, why
    (
        PersistenceBase,
        "has_metadata",
        "8ef9fc85d6",
        refuse_unrecorded,
        TRUTH,
        "results without a record are called up to date",
    ),
    (
        PersistenceBase,
        "incomplete",
        "939c0fa2b8",
        keep_finished,
        WORK,
        "finished work of an interrupted run is repeated",
    ),
    (
        PythonScript,
        "execute_script",
        "b84c8fd0aa",
        in_forks,
        WORK,
        "every job imports its libraries anew",
    ),
    (
        snakemake.rules,
        "get_function_params",
        "fc42a1688a",
        cache,
        SPEED,
        "asked for every job",
    ),
    (
        snakemake.common,
        "get_function_params",
        "fc42a1688a",
        cache,
        SPEED,
        "asked for every job",
    ),
    (
        snakemake.io,
        "apply_wildcards",
        "85519988ed",
        instead(filled),
        SPEED,
        "matches a pattern for every path",
    ),
    (
        ScriptProcessor,
        "process_job",
        "185398e886",
        once_per_rule,
        SPEED,
        "reads a script for every job",
    ),
    (
        Rule,
        "is_producer",
        "aea3236734",
        of_equal_depth,
        SPEED,
        "matches every rule with every file",
    ),
    (
        DAG,
        "file2jobs",
        "6acbb7ca8e",
        once_per_file,
        SPEED,
        "finds the jobs of a file for every reader",
    ),
    (
        JobScheduler,
        "_schedule_reevalutation",
        "058c948d25",
        instead(unless_one_comes),
        SPEED,
        "looks for jobs multiply",
    ),
]


def put_in(owner, name, digest, replacing, kind, why):
    """Replace an attribute of Snakemake, if it is known."""
    if kind == SPEED and os.environ.get("WINNOW_PATCHES") == "0":
        return
    original = getattr(owner, name, None)
    if getattr(original, "of_winnow", False):  # of an earlier run in this process
        return
    if original is not None and source_digest(original) == digest:
        replaced = replacing(original)
        replaced.of_winnow = True
        setattr(owner, name, replaced)
        return
    what = f"winnow: {owner.__name__}.{name} of Snakemake {snakemake.__version__} is not known here"
    if kind == TRUTH:
        print(f"{what}, so {why}; use a version from 9.20.0 to 9.27.1", file=sys.stderr)
        sys.exit(1)
    print(f"{what}, so it is left as it is ({why})", file=sys.stderr)


for patch in PATCHES:
    put_in(*patch)
