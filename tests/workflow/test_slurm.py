"""The workflow through a real Slurm: heavy rules are jobs of the cluster, GPU rules get their GPU, nothing runs twice."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.workflow.test_rerun_truth import Place

pytestmark = [
    pytest.mark.workflow,
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("sinfo") or subprocess.call("sinfo") != 0, reason="no Slurm"),
]
ROUNDED = {"kind": "rounded", "bits": [2, 3, 4], "group": 16, "grids": ["full"], "rounding": "feedback"}
LOCAL = {"cards", "tables", "figures", "report", "all"}


class Cluster(Place):
    """A place whose runs are submitted, with the profile as its user fills it in."""

    def __init__(self, folder: Path, name: str, keeps: tuple[float, ...] = (0.8,)):
        super().__init__(folder)
        self.config["budgets"] = {f"ffn-{keep}": {"targets": ["ffn"], "keep_bytes": keep} for keep in keeps}
        self.experiment(methods=["whitened"], budgets=list(self.config["budgets"]))
        self.config["models"]["pico"]["shards"] = 1
        self.name = name
        text = (ROOT / "profiles" / "slurm" / "config.yaml").read_text()
        accounts = words("sacctmgr", "-n", "show", "associations", "format=account%60")
        partitions = words("sinfo", "-h", "-o", "%R")
        gpu = next((p for p in partitions if "gpu" in p), partitions[-1])
        mine = {"GPU_PARTITION": gpu, "PARTITION": partitions[0], "ACCOUNT": accounts[-1] if accounts else "none"}
        for placeholder, value in mine.items():
            text = re.sub(rf"\b{placeholder}\b", value, text)
        filled = yaml.safe_load(text) | {"slurm-jobname-prefix": name, "slurm-init-seconds-before-status-checks": 5}
        (self.folder / "profile").mkdir()
        (self.folder / "profile" / "config.yaml").write_text(yaml.safe_dump(filled))

    def start(self, *arguments: str) -> subprocess.Popen:
        command = self.command(*arguments, "--profile", "profile")
        with open(self.folder / "output.txt", "a") as log:
            return subprocess.Popen(**command, stdout=log, stderr=log)

    def said(self) -> str:
        return (self.folder / "output.txt").read_text()

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm says of this place's jobs, in their order: name, state, comment, resources."""
        fields = ["JobID", "JobName", "State", "Comment", "AllocTRES", "ReqMem", "Timelimit"]
        command = ["sacct", "-X", "-n", "-P", "-o", ",".join(f"{field}%200" for field in fields)]
        rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found = [dict(zip(fields, row.split("|"), strict=True)) for row in rows]
        return [job for job in found if job["JobName"].startswith(self.name)]


def test_heavy_rules_are_jobs_and_a_killed_run_is_taken_up(tmp_path):
    name = f"winnow-test-{os.getpid()}"
    cluster = Cluster(tmp_path, name, keeps=(0.8, 0.6))
    first = cluster.start()
    try:
        wait(lambda: [job for job in cluster.jobs() if job["State"] == "COMPLETED"], 600)
        first.send_signal(signal.SIGKILL)
        first.wait()
        wait(lambda: not running(name), 300)  # orphans finish, or are cancelled by their name
        done_before = {path: path.read_bytes() for path in (cluster.folder / "results").glob("texts/*.parquet")}
        assert cluster.start().wait(timeout=1500) == 0, cluster.said()[-3000:]
    finally:
        first.kill()
        subprocess.run(["scancel", "--name", name], check=False)
    assert all(path.read_bytes() == content for path, content in done_before.items())
    rules = Counter(rule_of(job) for job in cluster.jobs() if job["State"] == "COMPLETED")
    assert {"retrieve_model", "tokenize", "collect_statistics", "factorize"} <= set(rules)
    assert rules["compress"] == rules["evaluate_perplexity"] == 1, "both budgets in one submission"
    assert not set(rules) & LOCAL, "tables and figures are made where the run was started"
    for job in cluster.jobs():
        heavy = rule_of(job) in ("collect_statistics", "factorize", "evaluate_dense", "evaluate_perplexity")
        assert ("gres/gpu=1" in job["AllocTRES"]) == heavy, job
    assert (cluster.folder / "results" / "report.html").is_file()


def test_windows_and_layers_over_jobs_of_a_model_that_is_read_block_by_block(tmp_path):
    """With factors that are fitted again, and a refinement: the losses are those of one process that holds the whole model."""
    name = f"winnow-parts-{os.getpid()}"
    places = Cluster(tmp_path / "cluster", name, keeps=(0.4,)), Place(tmp_path / "here")
    for place in places:
        place.config["methods"] = {"rounded": {"structure": ROUNDED, "metric": {"kind": "two_sided"}}}
        budget = {"targets": ["ffn", "attention"], "keep_bytes": 0.4, "allocation": {"kind": "ilp"}}
        place.config["budgets"] = {"some": budget}
        place.config["recoveries"] = {"short": {"kind": "refine", "steps": 2, "batch": 2, "every": 1, "layers": [0]}}
        place.experiment(methods=["rounded"], budgets=["some"], recoveries=["none", "short"])
    cluster, here = places
    cluster.config["models"]["pico"] |= {"load": "stream", "shards": 2, "window_shards": 2, "factors": "refitted"}
    here.config["models"]["pico"]["source"] = str(cluster.folder / "model")
    try:
        assert cluster.start().wait(timeout=1500) == 0, cluster.said()[-3000:]
    finally:
        subprocess.run(["scancel", "--name", name], check=False)
    assert here.run("--quiet").returncode == 0
    rules = Counter(rule_of(job) for job in cluster.jobs() if job["State"] == "COMPLETED")
    for rule in ("collect_statistics_part", "collect_gradients_part", "factorize"):
        assert rules[rule] == 2, rules
    assert {"merge_statistics", "merge_gradients", "predict_losses", "compress_refitted", "recover"} <= set(rules)
    for job in cluster.jobs():
        merging = rule_of(job).startswith("merge")
        heavy = rule_of(job).startswith(("collect", "factorize", "predict", "compress_refitted", "recover", "evaluate"))
        assert merging or ("gres/gpu=1" in job["AllocTRES"]) == heavy, job
    tables = [pd.read_csv(place.folder / "results" / "tables" / "summary.csv") for place in places]
    assert list(tables[0]["recovery"]) == list(tables[1]["recovery"])
    assert len(tables[0]) >= 3
    for column in ("nll", "keep_bytes"):
        assert list(tables[0][column]) == pytest.approx(list(tables[1][column]), rel=1e-4)


def rule_of(job: dict[str, str]) -> str:
    """The rule of a job, or of the jobs that were submitted together as it."""
    name = job["Comment"].removeprefix("rule_")
    return name.partition("_wildcards")[0] if "_wildcards" in name else name.partition("_")[2] or name


def words(*command: str) -> list[str]:
    """What a command of Slurm prints, cut at spaces."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def running(name: str) -> list[str]:
    return [job for job in words("squeue", "-h", "-o", "%j") if job.startswith(name)]


def wait(ready, seconds: float) -> None:
    """Until `ready()` is true."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(2)
