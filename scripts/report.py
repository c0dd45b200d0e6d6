"""Rule `report`: one HTML file with a summary, tables, figures, what was chosen, and the provenance of every number."""

from winnow.io.artifacts import read_json, read_markup, read_parquet, write_markup
from winnow.jobs.start import start_job
from winnow.reporting.report import render

if __name__ == "__main__":
    job = start_job(snakemake)
    figures = {name: read_markup(snakemake.input[name]) for name in ("ranking", "spectra")}
    results = {path: read_json(path) for path in snakemake.input.results}
    overlaps = [read_json(path) for path in snakemake.input.overlaps]
    manifests = [[read_json(path) for path in snakemake.input[name]] for name in ("moments", "allocations", "models")]
    summary, spread = read_parquet(snakemake.input.summary), read_parquet(snakemake.input.spread)
    write_markup(snakemake.output[0], render(summary, spread, figures, results, overlaps, *manifests), job.provenance)
