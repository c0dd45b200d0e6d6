"""Rules `evaluate_*`, for every kind of evaluation: the dense model, a compressed one, or the dense one after a recovery."""

from winnow.evaluation.base import EVALUATIONS, Given, measured
from winnow.io.artifacts import Bundle, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if __name__ == "__main__":
    job = start_job(snakemake)
    inputs, resources = dict(snakemake.input.items()), dict(snakemake.resources.items())
    checkpoint = Bundle(inputs["checkpoint"]) if inputs.get("checkpoint") else None
    evaluation = EVALUATIONS[job.spec["kind"]]
    files, output = ModelFiles(inputs["model"]), snakemake.output[0]
    given = Given(job.spec, files, checkpoint, inputs, resources, job.device, job.provenance, output)
    write_json(output, measured(evaluation, given), job.provenance)
    evaluation.clear(given)
