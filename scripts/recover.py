"""Rules `recover` and `recover_dense`: a checkpoint, or the dense model, trained on the calibration windows at its own bytes."""

from pathlib import Path

from winnow.io import Bundle, atomic, read_tensors
from winnow.models import ModelFiles
from winnow.recovered import task_of, write_recovered
from winnow.recoveries import options_of
from winnow.recovery import recovery_of
from winnow.resume import Resume
from winnow.runtime import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    spec, given = job.spec, snakemake.input
    files, options = ModelFiles(given.model), options_of(spec["recovery"])
    checkpoint = Bundle(given.checkpoint) if given.get("checkpoint") else None
    windows = read_tensors(given.tokens, sealed=True)[0]["ids"]
    target = Path(snakemake.output[0]).parent
    resume = Resume(target, job.provenance)
    gradients = Bundle(given.gradients) if given.get("gradients") else None
    task = task_of(files, checkpoint, windows, options, spec["first_token"], job.device, resume, gradients)
    if given.get("train"):
        task.rows = {"train": given.train, "facts": given.facts, "tokenizer": files.directory, "length": spec["length"]}
    report = recovery_of(spec["recovery"]["kind"])(task)
    with atomic(target) as folder:
        write_recovered(folder, files, checkpoint, task, {"name": spec["name"], **spec["recovery"]}, report, job)
    resume.clear()
