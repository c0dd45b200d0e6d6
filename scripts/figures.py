"""Rule `figures`: loss against bytes, methods in order of their loss, and effective rank against depth."""

from pathlib import Path

from winnow.io.artifacts import read_json, read_parquet
from winnow.jobs.start import start_job
from winnow.reporting.chosen import dense_bits
from winnow.reporting.figures import effective_rank, save
from winnow.reporting.frontier import frontier, ranking

if __name__ == "__main__":
    job = start_job(snakemake)
    summary = read_parquet(snakemake.input.summary)
    bits = dense_bits([read_json(path) for path in snakemake.input.models])
    save(frontier(summary, bits), snakemake.output.frontier, job.provenance)
    save(ranking(summary), snakemake.output.ranking, job.provenance)
    spectra = {Path(path).parts[1:4]: read_parquet(path) for path in snakemake.input.spectra}
    save(effective_rank(spectra), snakemake.output.spectra, job.provenance)
