"""Rule `export_dense`: a checkpoint exported as a dense Hugging Face directory."""

from pathlib import Path

from winnow.checkpoint.export import export_dense
from winnow.io.artifacts import atomic
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    with atomic(Path(snakemake.output[0]).parent) as folder:
        export_dense(Path(snakemake.input[0]).parent, folder, job.provenance, dtype=job.spec["dtype"])
