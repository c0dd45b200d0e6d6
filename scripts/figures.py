"""Rule `figures`: loss against bytes, methods in order of their loss, and effective rank against depth."""

from pathlib import Path

from winnow.io.artifacts import read_parquet
from winnow.jobs.start import start_job
from winnow.reporting.figures import effective_rank, frontier, ranking, save

if __name__ == "__main__":
    job = start_job(snakemake)
    summary = read_parquet(snakemake.input.summary)
    save(frontier(summary), snakemake.output.frontier, job.provenance)
    save(ranking(summary), snakemake.output.ranking, job.provenance)
    spectra = {Path(path).parts[1:4]: read_parquet(path) for path in snakemake.input.spectra}
    save(effective_rank(spectra), snakemake.output.spectra, job.provenance)
