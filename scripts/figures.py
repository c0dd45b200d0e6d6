"""Rule `figures`: loss against bytes, and effective rank against depth."""

from pathlib import Path

from winnow.figures import effective_rank, frontier, save
from winnow.io import read_parquet
from winnow.runtime import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    save(frontier(read_parquet(snakemake.input.summary)), snakemake.output.frontier)
    spectra = {Path(path).parts[1:4]: read_parquet(path) for path in snakemake.input.spectra}
    save(effective_rank(spectra), snakemake.output.spectra)
