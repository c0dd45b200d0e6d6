"""Mistakes in configuration files and arguments, as Snakemake hands them on: one line, also where it is asked to be quiet."""

import os
import shutil
import sys

import pytest

from tests.conftest import ROOT
from tests.dry_runs import dry_run

pytestmark = pytest.mark.workflow
MINE = "budgets: {x: {targets: [ffn], keep_bytes: 0.5}}\n"
NAME = "n" * 260
# (content of mine.yaml, arguments, the line) beside the default configuration
CASES = {
    "a name that there is not": (
        "experiments: {mine: {models: [demo], calibrations: [demo], methods: [whitned], budgets: [x], evaluations: [demo]}}",
        [],
        "mine.yaml: experiments.mine.methods: there is no 'whitned'; did you mean 'whitened'?",
    ),
    "a value in the place of the default's": (
        "budgets: {ffn-0.8: {keep_bytes: 1.2}}\n",
        [],
        "mine.yaml: budgets.ffn-0.8.keep_bytes: Input should be less than or equal to 1",
    ),
    "a long name": (
        MINE.replace("x:", f"{NAME}:"),
        [],
        f"mine.yaml: budgets.{NAME}: a name must have at most 150 characters, since it is part of file names; this one has 260",
    ),
    "an argument's key twice": (
        MINE,
        ["--config", "budgets={x: {keep_bytes: 0.4, keep_bytes: 0.6}}"],
        "--config budgets, line 1: x.keep_bytes is already given in line 1; keep one of them",
    ),
}


@pytest.mark.parametrize(("content", "arguments", "line"), CASES.values(), ids=CASES)
def test_the_line_is_printed_and_names_whose_mistake_it_is(tmp_path, content, arguments, line):
    """In a folder that has the workflow's own configuration too, which comes last in Snakemake's list."""
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "config.yaml", tmp_path / "config")
    (tmp_path / "mine.yaml").write_text(content)
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "all", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]
    command += ["--directory", str(tmp_path), "--configfile", "mine.yaml", *arguments]
    done = dry_run(command, tmp_path, {**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1, done.stdout + done.stderr
    (found,) = [row for row in done.stderr.splitlines() if row.startswith("winnow: ")]
    assert found.replace(f"{tmp_path}/", "") == f"winnow: {line}"
