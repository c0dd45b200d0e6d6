"""Rule `demo_model`: train the demo model and write it with its card."""

from pathlib import Path

from winnow.io.artifacts import atomic
from winnow.jobs.start import start_job
from winnow.training.demo import build

if __name__ == "__main__":
    job = start_job(snakemake)
    with atomic(Path(snakemake.output[0]).parent) as folder:
        build(folder, snakemake.input.train, snakemake.input.evaluation, job.spec)
