"""Rule `studies`: one page of all papers, from the finished folders of their studies."""

from winnow.io.artifacts import write_markup
from winnow.jobs.start import start_job
from winnow.reporting.html import render_studies
from winnow.studies.claims import VERDICTS

if __name__ == "__main__":
    job = start_job(snakemake)
    write_markup(snakemake.output[0], render_studies(list(snakemake.input), job.spec["studies"], VERDICTS), job.provenance)
