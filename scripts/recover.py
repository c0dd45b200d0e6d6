"""Rules `recover` and `recover_dense`: a recovery of a checkpoint, or of the dense model, at the same bytes."""

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, atomic, read_tensors
from winnow.io.resume import Resume
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.recovery.base import recovery_of
from winnow.recovery.recover import task_of, write_recovered

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Recover" = job.spec
    given = snakemake.input
    files, recovery = ModelFiles(given.model), recovery_of(spec["recovery"])
    checkpoint = Bundle(given.checkpoint) if given.get("checkpoint") else None
    windows = read_tensors(given.tokens, sealed=True)[0]["ids"]
    target = Path(snakemake.output[0]).parent
    resume = Resume(target, job.provenance)
    gradients = Bundle(given.gradients) if given.get("gradients") else None
    task = task_of(files, checkpoint, windows, recovery.options, spec["first_token"], job.device, resume, gradients)
    if given.get("train"):
        task.rows = {"train": given.train, "facts": given.facts, "tokenizer": files.directory, "length": spec["length"]}
    report = recovery.recover(task)
    with atomic(target) as folder:
        write_recovered(folder, files, checkpoint, task, {"name": spec["name"], **spec["recovery"]}, report, job)
    resume.clear()
