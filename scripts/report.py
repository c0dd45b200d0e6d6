"""Rule `report`: one HTML file with tables, figures, and the provenance of every number."""

from winnow.io.artifacts import read_json, read_markup, read_parquet, write_markup
from winnow.jobs.start import start_job
from winnow.reporting.html import render

if __name__ == "__main__":
    job = start_job(snakemake)
    figures = {name: read_markup(snakemake.input[name]) for name in ("frontier", "ranking", "spectra")}
    results = [read_json(path) for path in snakemake.input.results]
    overlaps = [read_json(path) for path in snakemake.input.overlaps]
    moments = [read_json(path) for path in snakemake.input.moments]
    summary, spread = read_parquet(snakemake.input.summary), read_parquet(snakemake.input.spread)
    write_markup(snakemake.output[0], render(summary, spread, figures, results, overlaps, moments), job.provenance)
