"""What goes wrong on a cluster, on purpose: every drill ends with the bytes of a local run, and says what happened."""

import os
import re
import shutil
import subprocess
import time

import pytest

from tests.workflow.test_crash import artefacts, different
from tests.workflow.test_slurm import Cluster, pytestmark, rule_of, running, wait, words  # noqa: F401

RULE = "evaluate_perplexity"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A place where all is done, by a run without a cluster, and the bytes that it made."""
    cluster = Cluster(tmp_path_factory.mktemp("drills"), f"winnow-drill-{os.getpid()}")
    done = cluster.run()
    assert done.returncode == 0, done.stdout + done.stderr
    yield cluster, artefacts(cluster.folder)
    subprocess.run(["scancel", "--name", ",".join({job["JobName"] for job in cluster.jobs()} or {"none"})], check=False)


class Drill:
    """One evaluation is missing (and its checkpoint, where asked for), and a run on the cluster makes it again."""

    def __init__(self, finished, checkpoint: bool = False):
        self.cluster, self.expected = finished
        self.before = len(self.cluster.jobs())
        (self.cluster.folder / "output.txt").unlink(missing_ok=True)
        (folder,) = self.cluster.folder.glob("results/pico-*/few-*/whitened-*/ffn-0.8-*")
        (result,) = folder.glob("none-*/short-*.json")
        result.unlink()
        shutil.rmtree(self.cluster.folder / "results" / "tables")  # else nobody asks for what is missing
        if checkpoint:
            shutil.rmtree(folder / "checkpoint")

    def jobs(self, rule: str = RULE) -> list[dict[str, str]]:
        """Those of a rule that were submitted in this drill."""
        return [job for job in self.cluster.jobs()[self.before :] if rule_of(job) == rule]

    def job_in(self, state: str, rule: str = RULE) -> str:
        """The id of a rule's job, when it is in a state."""
        found: list[str] = []

        def ready() -> bool:
            rows = subprocess.run(["squeue", "-h", "-o", "%A %T %k"], capture_output=True, text=True, check=True).stdout
            found[:] = re.findall(rf"(?m)^(\d+) {state} rule_(?:[a-z]+_)?{rule}(?:_wildcards.*)?$", rows)
            return bool(found)

        wait(ready, 120)
        return found[0]

    @staticmethod
    def step_of(job: str) -> str:
        """The same id, when the job's own process has begun."""
        wait(lambda: f"{job}.0" in words("squeue", "-h", "-s", "-j", job, "-o", "%i"), 60)
        return job

    def check(self) -> None:
        assert different(artefacts(self.cluster.folder), self.expected) == [], self.cluster.said()[-3000:]
        assert not running(self.cluster.name)


def test_a_job_that_needs_more_memory_than_it_asked_for_gets_twice_as_much(finished):
    drill = Drill(finished)
    needs = "RUNNER = {} * MB"  # what is asked for will be 1,000 MB too low
    drill.cluster.edit("src/winnow/planning/needs.py", needs.format(500), needs.format(-500))
    try:
        assert drill.cluster.start().wait(timeout=300) == 0, drill.cluster.said()[-3000:]
    finally:
        drill.cluster.edit("src/winnow/planning/needs.py", needs.format(-500), needs.format(500))
    *killed, last = drill.jobs()
    assert killed
    assert all(job["State"] in ("FAILED", "OUT_OF_MEMORY") for job in killed)
    assert last["State"] == "COMPLETED"
    asked = [int(job["ReqMem"].removesuffix("M")) for job in drill.jobs()]
    assert asked == [300 * 2**attempt for attempt in range(len(asked))]
    said = drill.cluster.said()
    assert "Error in group evaluate" in said
    assert f"winnow: several {RULE}: job {killed[0]['JobID']} took more memory than it asked for" in said
    drill.check()


def test_a_job_that_hangs_is_stopped_at_its_time_limit_and_gets_twice_as_long(finished):
    drill = Drill(finished)
    drill.cluster.edit("workflow/rules/evaluation_inputs.smk", "minutes(evaluation.minutes)", "minutes(1)")
    run = drill.cluster.start()
    job = drill.step_of(drill.job_in("RUNNING"))
    subprocess.run(["scancel", "--signal=STOP", job], check=True)  # it hangs, as on a file system that does not answer
    assert run.wait(timeout=300) == 0, drill.cluster.said()[-3000:]
    stopped, again = drill.jobs()
    assert (stopped["State"], again["State"]) == ("TIMEOUT", "COMPLETED")
    assert (stopped["Timelimit"], again["Timelimit"]) == ("00:01:00", "00:02:00")
    said = drill.cluster.said()
    assert "Error in group evaluate" in said
    assert f"winnow: several {RULE}: job {job} did not end within its time limit" in said
    drill.check()


def test_a_cancelled_job_is_named_and_the_plain_command_finishes(finished):
    drill = Drill(finished)
    run = drill.cluster.start("--retries", "0")
    job = drill.step_of(drill.job_in("RUNNING"))
    subprocess.run(["scancel", job], check=True)
    assert run.wait(timeout=300) != 0
    said = drill.cluster.said()
    assert "Error in group evaluate" in said
    assert f"winnow: several {RULE}: job {job} was cancelled" in said
    assert re.search(rf"results/logs/{RULE}/pico-\S+\.log", said)
    assert drill.cluster.start().wait(timeout=300) == 0, drill.cluster.said()[-3000:]
    cancelled, again = drill.jobs()
    assert cancelled["State"].startswith("CANCELLED")
    assert again["State"] == "COMPLETED"
    drill.check()


def test_jobs_wait_while_the_node_is_drained_and_nothing_is_lost(finished):
    nodes = set(words("sinfo", "-h", "-N", "-o", "%N"))
    if len(nodes) > 1:
        pytest.skip("a cluster of others, perhaps")
    (node,), drill = nodes, Drill(finished, checkpoint=True)
    run = drill.cluster.start()
    drill.job_in("RUNNING", "compress")
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=drain", "reason=drill"], check=True)
    try:
        waiting = drill.job_in("PENDING")
        time.sleep(15)
        assert waiting == drill.job_in("PENDING"), "it waits for the node"
        assert [job["State"] for job in drill.jobs("compress")] == ["COMPLETED"], "what ran was left to finish"
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=True)
    assert run.wait(timeout=300) == 0, drill.cluster.said()[-3000:]
    assert [job["State"] for job in drill.jobs()] == ["COMPLETED"]
    assert "Error" not in drill.cluster.said()
    drill.check()
