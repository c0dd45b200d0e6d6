"""Rules `evaluate_*`, for every kind of evaluation: the dense model, a compressed one, or the dense one after a recovery."""

from typing import TYPE_CHECKING

from winnow.evaluation.base import EVALUATIONS, Given, measured
from winnow.io.artifacts import Bundle, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Evaluate" = job.spec
    inputs, output = snakemake.input, snakemake.output[0]
    checkpoint = Bundle(inputs.checkpoint) if inputs.get("checkpoint") else None
    evaluation, files = EVALUATIONS[spec["kind"]], ModelFiles(inputs.model)
    keep_at = snakemake.output.get("states")
    given = Given(spec, files, checkpoint, inputs, snakemake.resources, job.device, job.provenance, output, keep_at)
    write_json(output, measured(evaluation, given), job.provenance)
    evaluation.clear(given)
