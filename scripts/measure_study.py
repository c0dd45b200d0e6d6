"""Rule `measure_study`: what a study measures on a model's weights and statistics."""

from winnow.io import Bundle, write_json
from winnow.models import ModelFiles
from winnow.runtime import start_job
from winnow.studies import study_of

if __name__ == "__main__":
    job = start_job(snakemake)
    study = study_of(job.spec["study"])
    found = study.measure(ModelFiles(snakemake.input.model), Bundle(snakemake.input.moments))
    write_json(snakemake.output[0], found, job.provenance)
