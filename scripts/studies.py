"""Rule `studies`: one page of all papers, from the finished folders of their studies."""

from winnow.io import write_markup
from winnow.report import render_studies
from winnow.runtime import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    write_markup(snakemake.output[0], render_studies(list(snakemake.input), job.spec["studies"]), job.provenance)
