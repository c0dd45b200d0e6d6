"""What a cluster wrote when it stopped a job, said in one line."""

import os

import pytest

from winnow.jobs.stopped import MOST, TAIL, stopped

CANCELLED = "slurmstepd-n1: error: *** JOB 16 ON n1 CANCELLED AT 2026-11-25T19:26:46{} ***\n"
POLLED = "slurmstepd-n1: error: StepId=20.0 exceeded memory limit (408043520 > 314572800), being killed\n"
KERNEL = "slurmstepd: error: Detected 1 oom_kill event in StepId=20.0. Some of the step tasks have been OOM Killed.\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (POLLED, "took more memory than it asked for; every retry asks for twice as much"),
        (KERNEL, "took more memory than it asked for; every retry asks for twice as much"),
        (POLLED + CANCELLED.format(""), "took more memory than it asked for; every retry asks for twice as much"),
        (CANCELLED.format(" DUE TO TIME LIMIT"), "did not end within its time limit; every retry gets twice as long"),
        (CANCELLED.format(" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"), "was lost with its node"),
        (CANCELLED.format(" DUE TO PREEMPTION"), "had to give way to a job of others"),
        (CANCELLED.format(""), "was cancelled"),
        ("x" * 2 * TAIL + CANCELLED.format(""), "was cancelled"),
        ("slurmstepd-n1: error: *** STEP 20.0 ON n1 CANCELLED AT 2026-11-25T19:30:09 ***\n", None),
        ("winnow: recover: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n", None),
        ("Error in rule compress:\n    winnow: compress: budgets.x: its break-even rank is 38\n", None),
    ],
)
def test_the_reason_of_a_stopped_job(tmp_path, text, reason):
    path = tmp_path / "rule_compress" / "demo-1_few-2" / "16.log"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert stopped(tmp_path, since=0) == ([f"compress: job 16 {reason} ({path})"] if reason else [])


def test_jobs_of_earlier_runs_are_not_named_again_and_many_are_counted(tmp_path):
    folder = tmp_path / "group_evaluate_evaluate_perplexity"
    folder.mkdir(parents=True)
    for job in range(MOST + 5):
        (folder / f"{job}.log").write_text(CANCELLED.format(""))
        os.utime(folder / f"{job}.log", (1000 + job, 1000 + job))
    assert len(stopped(tmp_path, since=1010)) == MOST + 5 - 10
    lines = stopped(tmp_path, since=0)
    assert len(lines) == MOST + 1
    assert lines[0].startswith("several evaluate_perplexity: job 0 was cancelled")
    assert lines[-1] == f"and 5 more, whose logs are in {tmp_path}"
