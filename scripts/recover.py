"""Rules `recover` and `recover_dense`: a recovery of a checkpoint, or of the dense model, at the same bytes."""

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, atomic, read_tensors
from winnow.io.resume import Resume
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.recovery.base import TaskRows, recovery_of
from winnow.recovery.recover import given_of, write_recovered

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Recover" = job.spec
    inputs = snakemake.input
    files, recovery = ModelFiles(inputs.model), recovery_of(spec["recovery"])
    checkpoint = Bundle(inputs.checkpoint) if inputs.get("checkpoint") else None
    windows = read_tensors(inputs.tokens, sealed=True)[0]["ids"]
    target = Path(snakemake.output[0]).parent
    resume = Resume(target, job.provenance)
    gradients = Bundle(inputs.gradients) if inputs.get("gradients") else None
    options = (recovery.options, spec["first_token"], job.device, resume, gradients)
    given = given_of(files, checkpoint, windows, *options, recovery.streams and bool(snakemake.resources.stream))
    if inputs.get("train"):
        given.rows = TaskRows(inputs.train, inputs.facts, files.directory, spec["length"])
    report = recovery.recover(given)
    with atomic(target) as folder:
        write_recovered(folder, files, checkpoint, given, {"name": spec["name"], **spec["recovery"]}, report, job)
    resume.clear()
